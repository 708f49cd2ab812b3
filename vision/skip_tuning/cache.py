"""Prefix features, computed once: on the device, in host memory, or on disk as memory-mapped safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skipguide.config import as_whole, whole
from skipguide.errors import SkipError
from skipguide.files import landing, read_json
from skipguide.hosts.progress import progress_bar

Place = Literal["auto", "device", "host", "disk"]
SHARD_BYTES = 256 * 2**20
Extract = Callable[[list[int]], Tensor]


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, or on the host for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        return found["MemAvailable"]
    except (OSError, KeyError):
        return 4 * 2**30


def place_for(wanted: Place, size: int, limit: float | None, device: torch.device, folder: Path | None) -> Place:
    """Where `size` bytes of features go.

    `auto` takes the device if a quarter of its free memory is enough, else the host if half of its free memory is,
    else the disk.

    Raises:
        SkipError: if they are more than `limit`, or have to go to disk and there is no folder.
    """
    if limit is not None and size > limit:
        raise SkipError(
            f"expected at most {limit / 2**20:.0f} MiB of cached features; these images need {size / 2**20:.0f} MiB: "
            'raise cache_limit, use cache_dtype="float16", a later layer, or fewer images'
        )
    if wanted == "auto":
        if device.type != "cpu" and size <= free_bytes(device) // 4:
            return "device"
        if size <= free_bytes(torch.device("cpu")) // 2:
            return "host"
        wanted = "disk"
    if wanted == "disk" and folder is None:
        raise SkipError(f"expected a cache_dir, because {size / 2**20:.0f} MiB of features go to disk; got none")
    return wanted


def cache_key(parts: Mapping[str, Any]) -> str:
    """A short name for what the features depend on."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class FeatureCache:
    """Features of numbered images, [L, width] each.

    Attributes:
        place: `"device"`, `"host"` or `"disk"`.
        bytes: how much is held.
        reused: whether they were found on disk instead of computed.
    """

    def __init__(self, shards: Sequence[Tensor], per_shard: int, place: Place, device: torch.device) -> None:
        self.shards, self.per_shard, self.place, self.device = list(shards), per_shard, place, device
        self.bytes = sum(shard.numel() * shard.element_size() for shard in self.shards)
        self.reused = False

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def rows(self, places: Sequence[int]) -> Tensor:
        """Features of some images on the device, [N, L, width]."""
        if len(self.shards) == 1:
            picked = self.shards[0][torch.as_tensor(places, device=self.shards[0].device)]
        else:
            picked = torch.stack([self.shards[i // self.per_shard][i % self.per_shard] for i in places])
        return picked.to(self.device, non_blocking=True)

    @classmethod
    def build(
        cls,
        extract: Extract,
        count: int,
        *,
        place: Place,
        device: torch.device,
        batch: int,
        folder: Path | None = None,
        parts: Mapping[str, Any] | None = None,
        limit: float | None = None,
        progress: bool = True,
    ) -> FeatureCache:
        """Compute the features, or find them on disk.

        Args:
            extract: positions -> features [N, L, width].
            count: how many images.
            place: where they are held; not `"auto"`.
            device: where `rows` are wanted.
            batch: images per call of `extract`.
            folder: of the caches on disk.
            parts: what the features depend on, for the key on disk.
            limit: most bytes all caches in `folder` may take; the ones not used for longest are removed.
            progress: show a progress bar.

        Raises:
            SkipError: if a cache on disk is damaged or does not hold what its name says.
        """
        if place == "disk":
            assert folder is not None
            return cls._on_disk(extract, count, device, batch, folder, dict(parts or {}), limit, progress)
        where = device if place == "device" else torch.device("cpu")
        whole: Tensor | None = None
        for chunk in _chunks(range(count), batch, progress):
            features = extract(chunk)
            if whole is None:  # one block from the start: parts that are joined later would need twice the memory
                pin = place == "host" and device.type == "cuda"
                whole = torch.empty((count, *features.shape[1:]), dtype=features.dtype, device=where, pin_memory=pin)
            whole[chunk[0] : chunk[0] + len(chunk)] = features
        assert whole is not None
        return cls([whole], count, place, device)

    @classmethod
    def _on_disk(
        cls,
        extract: Extract,
        count: int,
        device: torch.device,
        batch: int,
        folder: Path,
        parts: dict[str, Any],
        limit: float | None,
        progress: bool,
    ) -> FeatureCache:
        home = folder / f"features-{cache_key(parts)}"
        if home.exists():
            cache = cls._open(home, count, device, parts)
            _check_rows(cache, extract, home)
            os.utime(home)
            cache.reused = True
            return cache
        landing(folder).mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
        try:
            per_shard = max(batch, SHARD_BYTES // max(1, parts.get("row_bytes", SHARD_BYTES // batch)))
            shards = []
            for number, members in enumerate(_chunks(range(count), per_shard, False)):
                rows = torch.cat([extract(chunk).cpu() for chunk in _chunks(members, batch, progress)])
                file = partial / f"features-{number:05d}.safetensors"
                save_file({"features": rows.contiguous()}, file)
                shards.append({"file": file.name, "bytes": file.stat().st_size, "hash": _file_hash(file)})
            index = {"version": 1, "parts": parts, "count": count, "per_shard": per_shard, "shards": shards}
            (partial / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
            os.replace(partial, home)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if limit is not None:
            prune(folder, limit, keep=home)
        return cls._open(home, count, device, parts)

    @classmethod
    def _open(cls, home: Path, count: int, device: torch.device, parts: dict[str, Any]) -> FeatureCache:
        advice = f"delete {home} (or pass cache_refresh=True) to compute it again"
        try:
            index = read_json(home / "index.json")
            same = (whole(index["version"]), index["parts"], whole(index["count"])) == (1, parts, count)
            per_shard = as_whole("per_shard", index["per_shard"])
            files = [(home / entry["file"], entry["bytes"], entry["hash"]) for entry in index["shards"]]
            changed = [
                file for file, size, digest in files if (file.stat().st_size, _file_hash(file)) != (size, digest)
            ]
            shards = [] if changed else [_features(file) for file, _, _ in files]
        except (OSError, KeyError, TypeError, SkipError, SafetensorError) as error:
            raise SkipError(f"expected a whole cache in {home}; it is damaged ({error}): {advice}") from error
        if not same:
            raise SkipError(
                f"expected a cache of {count} images for this model, layer and preprocessing; {home} holds "
                f"something else (a stale cache): {advice}"
            )
        if changed:
            raise SkipError(f"expected the features that were written to {changed[0]}; it was changed: {advice}")
        if len({shard.shape[1:] for shard in shards}) != 1 or shards[0].ndim != 3:
            shapes = [list(shard.shape) for shard in shards]
            raise SkipError(f"expected features [N, L, width] in {home}; got {shapes}: {advice}")
        if [len(shard) for shard in shards] != [min(per_shard, count - i) for i in range(0, count, per_shard)]:
            raise SkipError(f"expected {count} images in {home}; got {sum(map(len, shards))}: {advice}")
        return cls(shards, per_shard, "disk", device)


def _features(file: Path) -> Tensor:
    with safe_open(file, "pt") as opened:
        found: Tensor = opened.get_tensor("features")
    return found


def _chunks(members: Sequence[int] | range, size: int, progress: bool) -> Any:
    starts = range(0, len(members), size)
    return (
        list(members[i : i + size]) for i in progress_bar(starts, "prefix features", show=progress and len(starts) > 1)
    )


def _check_rows(cache: FeatureCache, extract: Extract, home: Path) -> None:
    """Compare the first and the last image with what the model computes now."""
    places = sorted({0, len(cache) - 1})
    now, held = extract(places).float().cpu(), cache.rows(places).float().cpu()
    if now.shape != held.shape or not torch.allclose(now, held, rtol=2e-2, atol=2e-2 * float(now.abs().mean())):
        raise SkipError(
            f"expected the features that the model computes now; {home} holds others (a stale cache): "
            "delete it (or pass cache_refresh=True) to compute it again"
        )


def _file_hash(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def prune(folder: Path, limit: float, keep: Path | None = None) -> None:
    """Remove the caches that were not used for longest, until the folder holds at most `limit` bytes."""
    homes = sorted((h for h in folder.glob("features-*") if h.is_dir()), key=lambda h: h.stat().st_mtime, reverse=True)
    homes.sort(key=lambda h: h != keep)
    total = 0
    for home in homes:
        total += sum(file.stat().st_size for file in home.iterdir())
        if total > limit and home != keep:
            shutil.rmtree(home)
