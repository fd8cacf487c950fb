"""What :func:`vgpo_kernels.check_batch` returns, and raises on request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Finding(NamedTuple):
    """One thing that looks wrong in a batch.

    Attributes:
        name: A short name, the same in every release: ``"shifted"``, ``"group-ids"``, ... (:func:`check_batch` lists
            them).
        message: What was found, with its figures, and what is right.

    """

    name: str
    message: str


class BatchFindings(tuple[Finding, ...]):
    """What :func:`vgpo_kernels.check_batch` found: a tuple of :class:`Finding`, empty where nothing looks wrong.

    Attributes:
        unchecked: What could not be looked at, and why, a line each.

    """

    unchecked: tuple[str, ...]

    def __new__(cls, findings: Iterable[Finding] = (), unchecked: Iterable[str] = ()) -> BatchFindings:
        """Make the tuple of ``findings``."""
        made = super().__new__(cls, tuple(findings))
        made.unchecked = tuple(unchecked)
        return made

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the findings, in their order."""
        return tuple(finding.name for finding in self)

    def __str__(self) -> str:
        lines = [f"{finding.name}: {finding.message}" for finding in self] or ["nothing looks wrong"]
        return "\n".join([*lines, *(f"not checked: {what}" for what in self.unchecked)])

    def __repr__(self) -> str:
        return f"<BatchFindings: {', '.join(self.names) or 'nothing looks wrong'}>"


class BatchError(ValueError):
    """What ``check_batch(..., raises=True)`` raises.

    Attributes:
        findings: The :class:`BatchFindings`.

    """

    def __init__(self, findings: BatchFindings) -> None:
        super().__init__(f"the batch looks wrong:\n{findings}")
        self.findings = findings
