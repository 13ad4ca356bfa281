"""Whose numbers may stand in one table: the newest records of a benchmark, machine by machine."""

from typing import NamedTuple

from benchmarks.results import Record


class Machine(NamedTuple):
    """What two runs must share to stand in one table."""

    device: str
    #: What its CPU can do; the name of a GPU.
    kind: str
    limit: str
    threads: int


def newest(records: list[Record], benchmark: str, part: str) -> dict[Machine, dict[str, Record]]:
    """Return the newest record of a benchmark for each machine and each value of `part`.

    Args:
        records: by date.
        benchmark: its name.
        part: what splits the rows of a record, by its key in a row.
    """
    found: dict[Machine, dict[str, Record]] = {}
    for record in records:
        if record["benchmark"] == benchmark:
            kind = record.get("cpu_capability") if record["device"] == "cpu" else record.get("gpu")
            limit = record.get("onednn_limit") or ""
            machine = Machine(record["device"], kind or record["machine"], limit, record["threads"])
            for value in {row[part]: None for row in record["rows"]}:
                rows = [row for row in record["rows"] if row[part] == value]
                of_machine = found.setdefault(machine, {})
                of_machine[value] = joined(of_machine.get(value), {**record, "rows": rows})
    return {
        machine: found[machine]
        for machine in sorted(found, key=lambda m: (m.device, m.kind, -m.threads, m.limit))
    }


def joined(before: Record | None, record: Record) -> Record:
    """Return a record with what another one at the same commit measured of other contenders.

    `make gpu` measures them in processes of their own.
    """
    if before is None or before["commit"] != record["commit"]:
        return record
    contenders = {row.get("contender") for row in record["rows"]}
    others = [row for row in before["rows"] if row.get("contender") not in contenders]
    if not others:
        return record
    commands = f"{before['command']}`, `{record['command']}"
    return {**record, "command": commands, "rows": [*others, *record["rows"]]}


def named(machine: Machine) -> str:
    """Return what a machine is called: in general terms, without its name."""
    if machine.device != "cpu":
        return machine.kind
    limit = f", torch kept to {machine.limit}" if machine.limit else ""
    return (
        f"CPU, {machine.kind}{limit}, {machine.threads} thread{'s' if machine.threads > 1 else ''}"
    )
