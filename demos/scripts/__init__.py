"""A short script for every model family, from `from_pretrained` to a file.

    python demos/scripts/ltx.py "a tram in the rain" -o tram.mp4     # a GPU and the released weights
    python demos/scripts/ltx.py --tiny                               # seconds on a CPU; random weights, so it is noise

`ltx`, `ltx2`, `wan22`, `hunyuan15` and `cogvideox` write a clip, `flux`, `sd35` and `qwen_image` a picture. Copy one to
where you need it, and change it: it needs skipguide and no other file of this folder, but for `--tiny`, whose pipelines
are in `tiny.py`. A file that is there is overwritten.

**The full forms were never run by us on the released weights:** there was no hub and no GPU where they were written.
The tests run the `--tiny` forms on the CPU: the same lines, with a tiny pipeline in place of the download. So the
arguments, the layers and the saving are tested; hub ids, offloading and compilation are not. The memory named in the
docstrings follows from the number of weights as their authors give it; nothing of it was measured.
"""

import sys
from pathlib import Path

# `python -m demos.scripts.ltx --tiny` finds tiny.py, too: the scripts import it as a file beside them.
sys.path.append(str(Path(__file__).parent))
