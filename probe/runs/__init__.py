"""Folders that commands work in: one command, one process and one run at a time."""

from probe.runs.folder import FORMAT, RunFolder
from probe.runs.locks import LOCK, NOTES, UNLOCKED, alone, remove_unfinished, working_in
from probe.runs.owners import (
    COMMANDS,
    Kind,
    at_work,
    check_free,
    check_output,
    check_outside,
    check_owner,
    claim_folder,
    owner_of,
)

__all__ = [
    "COMMANDS",
    "FORMAT",
    "LOCK",
    "NOTES",
    "UNLOCKED",
    "Kind",
    "RunFolder",
    "alone",
    "at_work",
    "check_free",
    "check_output",
    "check_outside",
    "check_owner",
    "claim_folder",
    "owner_of",
    "remove_unfinished",
    "working_in",
]
