"""Attributes that each thread has for itself: what a step keeps for a call is not that of another thread's call."""

from __future__ import annotations

import threading
from typing import Any


class OfThread:
    """An attribute of an object that each thread sets for itself; None where a thread has set nothing."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"{name} of threads"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        kept = None if instance is None else vars(instance).get(self._name)
        return getattr(kept, "value", None)

    def __set__(self, instance: object, value: object) -> None:
        vars(instance).setdefault(self._name, threading.local()).value = value
