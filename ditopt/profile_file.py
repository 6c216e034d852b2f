"""The profile file: one safetensors file whose metadata is what is no array, as JSON. Data only; numpy, no torch.

The metadata have one entry, ``ditopt_profile``:

    {"ditopt_profile": 1, "fingerprint": "sha256:...", "profile": {...}}

Nothing in the file depends on when or where it is written, so equal profiles make equal files.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ditopt.errors import ProfileError
from ditopt.plan_text import short
from ditopt.profile import Profile
from ditopt.profile_check import check_profile
from ditopt.profile_data import canonical, profile_arrays, profile_of, profile_text

FORMAT_VERSION = 2
KEY = "ditopt_profile"
MAX_BYTES = 8 * 2**30
MAX_HEADER = 100_000_000
"""What the safetensors format allows."""
DTYPES = {"F16", "F32", "F64", "BOOL"}
AGAIN = "make it again with `ditopt profile DIR --prompts FILE -o PROFILE`"


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write a profile file, whole or not at all.

    Raises:
        ProfileError: the profile is one that ``load_profile`` would refuse, or the folder is missing or not writable.
    """
    path = Path(path)
    check_profile(profile, f"{path} is not written: profile")
    text, arrays = profile_text(profile), profile_arrays(profile)
    size = len(text) + sum(array.nbytes for array in arrays.values())
    if size > MAX_BYTES:
        raise ProfileError(
            f"{path}: is not written: {size} bytes are over the limit of {MAX_BYTES}; profile fewer prompts, or fewer "
            "tables (`--collect`)"
        )
    whole = f'{{"{KEY}":{FORMAT_VERSION},"fingerprint":"{_hash(text, arrays)}","profile":{text}}}'
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, partial, metadata={KEY: whole})
        partial.chmod(0o666 & ~_umask())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ProfileError(f"{path}: cannot be written: {why}; choose a folder that exists and is writable") from error
    finally:
        with suppress(OSError):  # an interrupted writing leaves nothing behind
            partial.unlink(missing_ok=True)


def _umask() -> int:
    """What the permissions of new files leave out."""
    found = os.umask(0)
    os.umask(found)
    return found


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile file.

    Raises:
        ProfileError: the file is missing, too large, cut short, no profile, of another version, changed since it was
            written, or its parts disagree; the message names file and field and says what was expected.
    """
    path = Path(path)
    _expect_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            text, expected = _body(path, (file.metadata() or {}).get(KEY))
            arrays = dict(_read(path, file))
    except (SafetensorError, OSError) as error:
        raise ProfileError(f"{path}: {_what_is_wrong(path)} ({error}); {AGAIN}") from None
    if _hash(text, arrays) != expected:
        raise ProfileError(f"{path}, field fingerprint: is not that of the contents: the file was changed; {AGAIN}")
    profile = profile_of(text, arrays, str(path))
    check_profile(profile, str(path))
    return profile


def fingerprint(profile: Profile) -> str:
    """``sha256:...`` over all that a profile's file holds."""
    return _hash(profile_text(profile), profile_arrays(profile))


def _hash(text: str, arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.atleast_1d(array).data)
    return f"sha256:{digest.hexdigest()}"


def _expect_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ProfileError(
            f"{path}: no such profile; make one with `ditopt profile DIR --prompts FILE -o {path}`"
        ) from None
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror or error}") from None
    if path.is_dir():
        raise ProfileError(f"{path}: is a folder; give a profile file")
    if size > MAX_BYTES:
        raise ProfileError(f"{path}: {size} bytes are over the limit of {MAX_BYTES}; is this a profile?")


def _what_is_wrong(path: Path) -> str:
    """Tells a file that was cut short from one that never was a safetensors file."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
            if not start:
                return "is empty"
            if start.startswith((b"# A ditop", b"ditopt: ")):
                return "is a plan; a profile is what `ditopt profile` writes"
            size = path.stat().st_size
            header = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
            if not 0 < header <= MAX_HEADER or start[8:] != b"{":
                return "is not a profile, which is a safetensors file"
            if size < 8 + header:
                return f"was cut short: its header has {header} bytes, {size - 8} are there"
            file.seek(8)
            entries = json.loads(file.read(header))
        end = max((entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"), default=0)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return "is damaged: its header is no JSON of a safetensors file"
    if size < 8 + header + end:
        return f"was cut short: it has {size} of {8 + header + end} bytes"
    return "is damaged"


def _body(path: Path, whole: str | None) -> tuple[str, str]:
    """The JSON text of the profile, as it was hashed, and the hash."""
    if whole is None:
        raise ProfileError(f"{path}: is a safetensors file, but not a profile: its metadata have no entry {KEY!r}")
    try:
        data = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}, metadata {KEY}: no JSON: {short(error, 200)}; {AGAIN}") from None
    if not isinstance(data, dict):
        raise ProfileError(f"{path}, metadata {KEY}: expected a mapping, found {type(data).__name__}")
    version = data.get(KEY)
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        hint = "upgrade ditopt, or profile again" if newer else f"expected {FORMAT_VERSION}"
        raise ProfileError(f"{path}, field {KEY}: format version {short(repr(version))} is not supported; {hint}")
    for field in ("fingerprint", "profile"):
        if field not in data:
            raise ProfileError(f"{path}, field {field}: is missing; {AGAIN}")
    try:
        return canonical(data["profile"]), str(data["fingerprint"])
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}, field profile: {short(error, 200)}; expected finite numbers") from None


def _read(path: Path, file: Any) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for key in file.keys():  # noqa: SIM118  # it is no mapping
        dtype = file.get_slice(key).get_dtype()
        if dtype not in DTYPES:
            raise ProfileError(f"{path}, tensor {short(key)}: is {dtype}; expected one of {', '.join(sorted(DTYPES))}")
        yield key, file.get_tensor(key)
