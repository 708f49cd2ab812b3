"""The study of layer masking on procedural scenes.

    python -m demos.layer_masking            # all models: about 10 minutes on one CPU core once they are trained
    python -m demos.layer_masking --quick    # the bundled model alone, fewer scenes: under 3 minutes

Models are trained first if they are not there (`python -m demos.layer_masking.train`, 2.5 minutes each). Results go
to results.json, results.md and the plots beside this file (--quick: to runs/layer_masking/quick).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from demos.benchmarks.measure import keep_existing, write_json
from demos.layer_masking import data, measures, report, train

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)


def study_model(folder: Path, scenes: int, lime_scenes: int, samples: int, seed: int) -> dict:
    """Everything about one model."""
    model = train.load(folder)
    test = data.make_scenes(scenes, train.TEST_SEED)
    found: dict = {"accuracy": train.accuracy(model, test), "removal": []}
    for kind in tqdm(("patches", "superpixels"), desc=f"{folder.name}: removal", leave=False):
        segments = measures.patches(test, kind)
        found["removal"] += measures.removal(model, test, kind, segments, seed)
    found["leakage"] = measures.leakage(model, test)
    found["lime"] = measures.lime_rows(model, test[:lime_scenes], samples, seed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the bundled model, fewer scenes")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = train.RUNS / "quick" if args.quick else HERE
    out.mkdir(parents=True, exist_ok=True)
    keep_existing(out / "results.json", args.force)
    began = time.process_time()
    if args.quick:
        runs = {"plain-bundled": train.SHIPPED}
        settings = {"scenes": 100, "lime_scenes": 8, "samples": 256}
    else:
        runs = {
            f"{kind}-{seed}": train.run_folder(seed, kind == "erasing")
            for kind in ("plain", "erasing")
            for seed in SEEDS
        }
        settings = {"scenes": 300, "lime_scenes": 30, "samples": 256}
        for name, folder in runs.items():
            if not (folder / "model.safetensors").exists():
                kind, _, seed = name.partition("-")
                train.train_and_save(int(seed), kind == "erasing")
    done = train.RUNS / ("quick-parts" if args.quick else "parts")
    results = {"settings": settings, "models": {}}
    for name, folder in tqdm(runs.items(), desc="models"):
        part = done / f"{name}.json"
        if not part.exists() or args.force:
            seed = int(name[-1]) if name[-1].isdigit() else 0
            found = study_model(folder, seed=seed, **settings)
            write_json(part, {"settings": settings, **found})
        stored = json.loads(part.read_text(encoding="utf-8"))
        if stored.pop("settings") != settings:
            raise SystemExit(f"{part} is of another setting; delete it, or pass --force")
        results["models"][name] = stored
    results["cpu_seconds"] = round(time.process_time() - began, 1)
    report.write(out, results)
    print((out / "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
