"""Finished parts of a stage that is not finished: what an interrupted run leaves for the next.

They lie in work/partial/STAGE under names with the key of what they depend on, and are removed when
the stage is finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.files import Journal, digest_of
from abliterator.pipeline._run import Run

if TYPE_CHECKING:
    from abliterator.engines import Answer


def partial_file(run: Run, stage: str, name: str, key: Any) -> Path:
    """The file of a part of an unfinished stage.

    Args:
        run: the run.
        stage: its name.
        name: of the part, with the ending of the file.
        key: all that the part depends on, beside device, dtype and batch size.
    """
    digest = digest_of([key, run.device, run.dtype, run.batch_size])
    path = Path(name)
    return run.workspace.partial(stage) / f"{path.stem}-{digest[:16]}{path.suffix}"


class KeptAnswers(dict[int, "Answer"]):
    """Answers by prompt, written to a journal as they are added."""

    def __init__(self, journal: Journal, set_name: str) -> None:
        from abliterator.engines import Answer

        self._journal, self._set = journal, set_name
        super().__init__(
            (value["index"], Answer(**value["answer"] | _as_tokens(value["answer"])))
            for value in journal.values
            if value["set"] == set_name
        )

    def update(self, answers: Iterable[tuple[int, Answer]]) -> None:  # type: ignore[override]
        """Adds the answers of a batch, and writes them."""
        new = dict(answers)
        self._journal.append(
            *(
                {"set": self._set, "index": index, "answer": asdict(answer)}
                for index, answer in new.items()
            )
        )
        super().update(new)


def _as_tokens(answer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {"token_ids": tuple(answer["token_ids"])}
