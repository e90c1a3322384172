"""What tasks share whose prompts are made when a model's tokenizer is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar, runtime_checkable

Task = TypeVar("Task")
Encode = Callable[[str], list[int]]


@runtime_checkable
class Tokenizer(Protocol):
    """What such a task asks of a tokenizer beside encoding."""

    @property
    def unk_token_id(self) -> int | None:
        """The id that stands for whatever the vocabulary lacks, or None."""
        ...


class OneBatch(Generic[Task]):
    """A loader whose only batch is the task: its prompts wait for a tokenizer."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __iter__(self) -> Iterator[Task]:
        return iter((self.task,))

    def __len__(self) -> int:
        return 1
