"""Read WAV files as numbers in one channel, at the sampling rate of a model."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peftfx.errors import PeftfxError

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE  #: the codes of number formats in a WAV file
_CONVERT = "make one of it: ffmpeg -i FILE -ac 1 -ar 16000 out.wav"
_ZEROS, _ROLLOFF = 16, 0.97  #: of the filter: zero crossings on each side, and the cut-off relative to half of the rate


def read_wav(path: Path) -> tuple[Tensor, int]:
    """Read a WAV file. Return its samples, averaged over the channels, and their number per second.

    Args:
        path: the file. Its samples are integers (8 to 32 bits) or floats, in any number of channels, at any rate.

    Returns:
        float32[samples] from -1 to 1, and the rate.

    Raises:
        PeftfxError: the file is not a WAV file, is broken or empty, or holds NaN or an infinity.
    """
    data = path.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise PeftfxError("this is not a WAV file", str(path), _CONVERT)
    chunks = _chunks(data)
    if len(chunks.get(b"fmt ", b"")) < 16 or b"data" not in chunks:
        raise PeftfxError("this WAV file is broken: it lacks its format or its samples", str(path), _CONVERT)
    kind, channels, rate, _, width, bits = struct.unpack("<HHIIHH", chunks[b"fmt "][:16])
    if kind == _EXTENSIBLE and len(chunks[b"fmt "]) >= 26:
        (kind,) = struct.unpack("<H", chunks[b"fmt "][24:26])
    if not channels or not rate or width != channels * bits // 8:
        raise PeftfxError("this WAV file is broken: the sizes in its header contradict each other", str(path), _CONVERT)
    body = chunks[b"data"]
    samples = _numbers(body[: len(body) // width * width], kind, bits, path).reshape(-1, channels)
    if not len(samples):
        raise PeftfxError("the recording is empty", str(path), "give a recording with sound")
    if not np.isfinite(samples).all():
        raise PeftfxError("the recording holds NaN or an infinity", str(path), "record the sound again")
    return torch.from_numpy(np.ascontiguousarray(samples.mean(axis=1), dtype=np.float32)), int(rate)


def resample(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """Resample a sound by a windowed sinc. Frequencies above half of the lower rate are removed.

    Args:
        samples: the sound, float[samples].
        rate: the number of samples per second.
        wanted: the new number of samples per second.

    Returns:
        The sound, float[ceil(samples * wanted / rate)].
    """
    if rate == wanted:
        return samples
    step, phases = rate // math.gcd(rate, wanted), wanted // math.gcd(rate, wanted)
    cut = min(step, phases) * _ROLLOFF
    reach = math.ceil(_ZEROS * step / cut)
    at = torch.arange(-reach, reach + step, dtype=torch.float64)[None] / step
    at = ((at - torch.arange(phases, dtype=torch.float64)[:, None] / phases) * cut).clamp(-_ZEROS, _ZEROS)
    filters = torch.sinc(at) * torch.cos(at * math.pi / _ZEROS / 2) ** 2 * cut / step
    padded = torch.nn.functional.pad(samples.double(), (reach, reach + step))
    made = torch.nn.functional.conv1d(padded[None, None], filters[:, None], stride=step)
    return made[0].T.reshape(-1)[: math.ceil(len(samples) * phases / step)].to(samples.dtype)


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """Return the first chunk of each name in the file. The last chunk may be cut off, as in a stream."""
    found: dict[bytes, bytes] = {}
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        found.setdefault(name, data[place + 8 : place + 8 + size])
        place += 8 + size + size % 2
    return found


def _numbers(body: bytes, kind: int, bits: int, path: Path) -> np.ndarray:
    if kind == _FLOAT and bits in (32, 64):
        return np.frombuffer(body, f"<f{bits // 8}").astype(np.float32)
    if kind == _PCM and bits == 8:
        return (np.frombuffer(body, np.uint8).astype(np.float32) - 128) / 128
    if kind == _PCM and bits in (16, 32):
        return np.frombuffer(body, f"<i{bits // 8}").astype(np.float32) / 2.0 ** (bits - 1)
    if kind == _PCM and bits == 24:
        parts = np.frombuffer(body, np.uint8).reshape(-1, 3).astype(np.int32)
        whole = parts[:, 0] | parts[:, 1] << 8 | parts[:, 2] << 16
        return (whole - ((whole & 0x800000) << 1)).astype(np.float32) / 2.0**23
    raise PeftfxError(f"peftfx cannot read a WAV file of format {kind} with {bits} bits", str(path), _CONVERT)
