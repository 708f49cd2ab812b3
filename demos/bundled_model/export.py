"""Make the pipeline folder from a training in progress: stock classes, weights in fp16, the calls it is made for.

python -m demos.bundled_model.export --weights runs/t2v/progress.safetensors --out runs/tiny-t2v --evaluate
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from diffusers import WanPipeline

from demos.bundled_model import evaluate
from demos.bundled_model.autoencoder import load_vae
from demos.bundled_model.model import assemble, build, call, stock_attention
from demos.bundled_model.progress import FOLDER, NOTES, load_weights, read_progress
from demos.bundled_model.text import build_tokenizer

HERE = Path(__file__).parent
FPS = 8


def pipeline(weights: Path, vae: Path) -> WanPipeline:
    """The stock pipeline of a file of averaged weights."""
    tokenizer = build_tokenizer()
    model = build(read_progress(weights).shape, tokenizer)
    load_weights(weights, model)
    return assemble(load_vae(vae), tokenizer, model.text_encoder, stock_attention(model.transformer))


def export(weights: Path, vae: Path, out: Path, steps: int, guidance: float) -> int:
    """Write the folder; returns its bytes."""
    pipe = pipeline(weights, vae)
    pipe.transformer.half()
    pipe.vae.half()  # the text encoder stays in fp32: transformers would load fp16 as fp16, which does not fit the rest
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    for path in partial.rglob("config.json"):  # they name the folder that a part was loaded from
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    notes = {"generation.json": call(steps, guidance) | {"fps": FPS}, NOTES: read_progress(weights).to_dict()}
    for name, values in notes.items():
        (partial / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="a run's progress.safetensors")
    parser.add_argument("--vae", type=Path, default=FOLDER / "vae")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--force", action="store_true", help="replace the folder if it is there")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument(
        "--evaluate", action="store_true", help="then measure it, with further options of demos.bundled_model.evaluate"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    args, more = parser.parse_known_args(arguments)
    if more and not args.evaluate:
        parser.error(f"{more[0]} is no option of an export (with --evaluate, it is one of the measurement)")
    if not args.weights.exists():
        parser.error(f"there are no weights at {args.weights}: name a run's progress.safetensors with --weights")
    if args.out.exists() and not args.force:
        parser.error(f"{args.out} is there already: choose another folder, or replace it with --force")
    size = export(args.weights, args.vae, args.out, args.steps, args.guidance)
    print(f"{args.out}: {size / 1e6:.2f} MB, {read_progress(args.weights)}")
    if args.evaluate:
        evaluate.main(["--model", str(args.out), "--out", str(args.results), *more])


if __name__ == "__main__":
    main()
