"""Weights that are pages of their checkpoint's file become the model's own, and the pages are given back.

Transformers maps a file into memory: its tensors on a CPU are the file's pages, and as long as one of them is used, say
a bias that is not cut, all of it stays mapped. A cut would free nothing, and the model be there twice.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

OF_FILE, PAGE_STATE = 61, 7  # bits of an entry of Linux's pagemap: of a file, swapped, present; 8 bytes a page
CHANGED = torch.tensor((0b010, 0b100))  # swapped or present, but no longer of the file


def leave_files(model: nn.Module) -> None:
    """Copy what lies in a mapped file, one tensor after the other, and give its pages back after each: the peak is the
    model and its largest tensor. Where the system does not list mappings (other than Linux), nothing happens.
    """
    files = _mapped_files()
    for tensor in (*model.parameters(), *model.buffers()):
        place = tensor.data_ptr() if tensor.device.type == "cpu" else 0
        if any(start <= place < end for start, end in files):
            tensor.data = tensor.data.clone()
            _give_back(place, tensor.nbytes)


def _mapped_files() -> list[tuple[int, int]]:
    """First address and end of every private mapping of a file."""
    with suppress(OSError), Path("/proc/self/maps").open(encoding="utf-8", errors="replace") as lines:
        mappings = [line.split() for line in lines]  # addresses, permissions, offset, device, inode, path
        files = [words[0].split("-") for words in mappings if words[1].endswith("p") and words[4] != "0"]
        return [(int(start, 16), int(end, 16)) for start, end in files]
    return []


def _give_back(place: int, size: int) -> None:
    """Who still looks at these pages finds what the file holds; so none of them may have been written to."""
    first = place // mmap.PAGESIZE
    pages = -(-(place + size) // mmap.PAGESIZE) - first
    with suppress(OSError), Path("/proc/self/pagemap").open("rb") as entries:
        entries.seek(8 * first)
        states = torch.frombuffer(bytearray(entries.read(8 * pages)), dtype=torch.int64) >> OF_FILE & PAGE_STATE
        if not torch.isin(states, CHANGED).any():
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(pages * mmap.PAGESIZE), mmap.MADV_DONTNEED
            )
