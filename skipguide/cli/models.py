"""From what the user calls a model to the model: a bundled name, a folder, or a hub id."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipguide.cli.arguments import BUNDLED
from skipguide.errors import SkipError
from skipguide.files import parse_json
from skipguide.hosts.progress import is_watched

WHOLE, PIECE = 64 << 20, 1 << 16  # bytes: files up to this size are hashed whole, larger ones in such pieces
DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        name: what the user wrote.
        folder: the folder it lies in; None for a hub id.
        bundled: whether it came with skipguide.
    """

    name: str
    folder: Path | None
    bundled: bool = False

    def read(self, filename: str, subfolder: str = "") -> dict[str, Any] | None:
        """A JSON file of the model, fetched from the hub if need be; None if the model has no such file."""
        if self.folder is None:
            path = _fetch(self.name, f"{subfolder}/{filename}" if subfolder else filename)
        else:
            path = self.folder / subfolder / filename
        if path is None or not path.is_file():
            return None
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SkipError(f"{path} is not JSON: {error}") from error
        content = parse_json(text, str(path), finite=False)  # configs of other libraries may have infinite numbers
        if not isinstance(content, dict):
            raise SkipError(f"expected settings as a mapping in {path}; got {type(content).__name__}")
        return content

    def defaults(self) -> dict[str, Any]:
        """What the model's own `generation.json` says a call should use; only folders have one."""
        return (self.read("generation.json") or {}) if self.folder else {}

    def content_hash(self) -> str:
        """Changes when the model's content does, and is the same wherever a copy of the model lies.

        For a hub id the commit; for a folder a hash over its files, of which the large ones are read in samples.
        """
        if self.folder is None:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(self.name, "model_index.json")
            return Path(found).parent.name if isinstance(found, str) else self.name
        digest = hashlib.sha256()
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = path.relative_to(self.folder)
            if not any(part.startswith(".") for part in name.parts):
                digest.update(f"{name.as_posix()} {path.stat().st_size}\n".encode())
                for piece in _samples(path):
                    digest.update(piece)
        return digest.hexdigest()[:16]


def _samples(path: Path) -> Iterator[bytes]:
    """A small file whole; of a large one (weights) 64 pieces spread over it, beginning and end among them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            yield file.read()
            return
        for number in range(64):
            file.seek(number * (size - PIECE) // 63)
            yield file.read(PIECE)


def resolve(name: str, ours: str = BUNDLED, hub: str = "Lightricks/LTX-Video") -> Source:
    """Find out what `name` is, without loading anything.

    Args:
        name: what the user called it.
        ours: a bundled model of the kind that is wanted, for the error.
        hub: one of that kind on the hub, for the error.

    Raises:
        SkipError: if it is neither bundled, nor a folder, nor the form of a hub id.
    """
    from skipguide.assets import bundled

    if re.fullmatch(r"[\w-]+", name):
        # A bundled name wins over a folder of that name, which can be written as ./name.
        with contextlib.suppress(SkipError):
            return Source(name, bundled(name), bundled=True)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(name, folder)
    if folder.exists():
        raise SkipError(f"{name} is a file; expected the folder that save_pretrained wrote")
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) and not name.startswith(("./", "../")):
        return Source(name, None)
    raise SkipError(f"no model {name!r}: expected {ours} (bundled), a folder, or a hub id such as {hub}")


def _fetch(repository: str, filename: str) -> Path | None:
    """A small file of a hub repository, from the cache if it is there."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(repository, filename, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        # Asked first, as a download tries five times over half a minute before it gives up.
        HfApi().model_info(repository, timeout=10)
    except RepositoryNotFoundError as error:
        raise SkipError(f"the hub has no model {repository}, or it needs a login (hf auth login)") from error
    except Exception as error:  # offline: the http library's own exceptions
        raise SkipError(
            f"model {repository} is neither a folder here nor in the local cache, and the hub does not "
            f"answer ({type(error).__name__})"
        ) from error
    try:
        return Path(hf_hub_download(repository, filename))
    except EntryNotFoundError:
        return None


def pipeline_class(source: Source) -> type:
    """The diffusers class that the model's `model_index.json` names; no weights are read.

    Raises:
        SkipError: if the model is not a diffusers pipeline.
    """
    index = source.read("model_index.json")
    if index is None:
        hint = " (it is a single model: only `describe` takes one)" if source.read("config.json") else ""
        raise SkipError(f"{source.name} is not a diffusers pipeline: it has no model_index.json{hint}")
    return _diffusers_class(index.get("_class_name"), source)


def _diffusers_class(name: Any, source: Source) -> type:
    import diffusers

    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type):
        raise SkipError(
            f"{source.name} wants the class {name!r}, which diffusers {diffusers.__version__} does not have"
        )
    return found


def choose_device(name: str) -> str:
    """The device to run on; `auto` takes cuda, then mps, then the CPU.

    Raises:
        SkipError: for a device that is not here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SkipError(f"cannot use device {name!r}: {str(error).splitlines()[0]}") from error
    return name


@contextlib.contextmanager
def few_threads(source: Source, device: str) -> Iterator[None]:
    """One thread for a bundled model on the CPU, unless OMP_NUM_THREADS is set; afterwards as many as before.

    Every command that runs a pipeline does so in here.

    It gains little from a second one, and where other work runs the two mostly wait for each other: with ten busy
    processes on two cores, a clip took 12 seconds of processor time instead of 0.7.
    """
    import torch

    before = torch.get_num_threads()
    if source.bundled and device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_dtype(name: str, device: str, *, bundled: bool) -> str:
    """The precision to load in. Bundled models are tiny: they stay exact everywhere."""
    if name != "auto":
        return name
    half = {"cuda": "bfloat16", "mps": "float16"}
    return "float32" if bundled else half.get(device.partition(":")[0], "float32")


def load_pipeline(source: Source, device: str, dtype: str) -> Any:
    """Load a pipeline with its weights.

    Raises:
        SkipError: if it cannot be loaded.
    """
    import diffusers
    import torch

    loading_bars(source)
    # diffusers 0.42 renamed the argument and warns about the old name
    old = tuple(int(n) for n in re.findall(r"\d+", diffusers.__version__)[:2]) < (0, 42)
    precision = {"torch_dtype" if old else "dtype": getattr(torch, dtype)}
    with loading(source.name):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(source.folder or source.name, **precision)
    return pipeline.to(device)


def loading_bars(source: Source) -> None:
    """Other libraries' bars while they download and read weights: it takes minutes, but for the models that ship."""
    import diffusers
    import transformers
    from huggingface_hub.utils.tqdm import enable_progress_bars

    shown = not source.bundled and is_watched()
    for library in (diffusers, transformers):
        bars = library.utils.logging
        (bars.enable_progress_bar if shown else bars.disable_progress_bar)()
    enable_progress_bars()  # of downloads, which transformers turns off with its own; by themselves on terminals only


@contextlib.contextmanager
def loading(name: str, kind: str = "") -> Iterator[None]:
    """While another library reads a model: whatever a damaged file makes it raise is one sentence.

    Args:
        name: what the user called the model.
        kind: what it was to be, for the error.

    Raises:
        SkipError: for anything that is raised inside but a lack of memory.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, SkipError) or type(error).__name__ == "OutOfMemoryError":
            raise
        reason = str(error) or type(error).__name__
        raise SkipError(f"cannot load {name}{kind and f' as {kind}'}: {reason}") from error


def vocabulary_note(tokenizer: Any, prompt: str) -> str:
    """What to tell a user whose prompt has words that a small model never saw; empty if it knows them all."""
    unknown = [
        word
        for word in dict.fromkeys(prompt.lower().split())
        if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False, padding=False).input_ids
    ]
    if not unknown:
        return ""
    words = sorted(word for token in tokenizer.get_vocab() if (word := token.strip("▁")).isalpha())
    return f"was not trained on {', '.join(unknown)}; its words are {', '.join(words)}"


def denoisers(pipeline: Any) -> dict[str, Any]:
    """The models of a pipeline whose blocks can be left out, by name."""
    return {name: model for name in DENOISERS if (model := getattr(pipeline, name, None)) is not None}


def empty_denoisers(source: Source) -> dict[str, Any]:
    """The denoisers of a pipeline that is not loaded: built from the configurations, without weights or memory.

    Args:
        source: a pipeline, or a single model.

    Raises:
        SkipError: if there is nothing to describe.
    """
    index = source.read("model_index.json")
    if index is not None:
        found = {name: name for name in DENOISERS if isinstance(index.get(name), list) and index[name][0]}
        if not found:
            raise SkipError(f"{source.name} ({index.get('_class_name')}) has none of {', '.join(DENOISERS)}")
    else:
        found = {"model": ""}
    return {name: _empty(source, subfolder) for name, subfolder in found.items()}


def _empty(source: Source, subfolder: str) -> Any:
    import torch

    config = source.read("config.json", subfolder)
    where = os.path.join(source.name, subfolder)
    if config is None:
        raise SkipError(f"{where} is not a model folder: it has neither model_index.json nor config.json")
    if "_class_name" not in config:
        raise SkipError(f"{where} is not a diffusers model: its config.json has no _class_name")
    model_class: Any = _diffusers_class(config["_class_name"], source)
    with torch.device("meta"):
        return model_class.from_config(config)
