"""Whether runs agree with published ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorasc_ds.errors import ConfigError
from lorasc_ds.study.publishing import Published
from lorasc_ds.study.records import Record
from lorasc_ds.study.tables import is_plain

COMPUTING = ("torch", "transformers", "peft", "accelerate", "numpy", "tokenizers", "scikit-learn", "scipy", "pillow")
DIGESTS = ("ledger_sha256", "weights_sha256")
SHARE_TOLERANCE, TOLERANCE = 0.05, 0.2  # on another processor: of shares, absolute; of all other scores, relative


def disagreements(published: Published, records: Sequence[Record]) -> Iterator[str]:
    """Where runs that were carried out here differ from the same ones that were published.

    Computed alike, on the same kind of processor with as many threads and the same versions, they have the same bits,
    by the digests of ledger and weights and by every score; else shares have to be within `SHARE_TOLERANCE` of those
    there, and other scores within `TOLERANCE` of the value.

    Raises:
        ConfigError: none of the runs was published.
    """
    done = {one.run.digest: one for one in records if one.state == "done" and one.kept is None}
    pairs = [(one, published.record(one.run, one.job)) for one in done.values()]
    pairs = [(ours, theirs) for ours, theirs in pairs if theirs.state == "done"]
    if not pairs:
        raise ConfigError(
            f"--against {published.file}: it has none of the {len(done)} runs that were carried out here: name results"
            " of the same study, or leave it out"
        )
    for ours, theirs in pairs:
        yield from (f"{ours.run.title}: {text}" for text in differences(ours, theirs))


def computed_alike(ours: Record, theirs: Record) -> bool:
    """Whether all that the bits depend on is the same, of the versions as far as both say them."""
    machines, versions = [], []
    for one in (ours, theirs):
        environment = one.environment or {}
        machines.append(((one.facts or {})["device"], environment.get("processor"), environment.get("threads")))
        versions.append(environment.get("packages") or {})
    first, second = versions
    shared = first.keys() & second.keys() & {*COMPUTING}
    return machines[0] == machines[1] and "torch" in shared and all(first[name] == second[name] for name in shared)


def differences(ours: Record, theirs: Record) -> Iterator[str]:
    alike = computed_alike(ours, theirs)
    if alike:
        facts = ours.facts or {}
        other = theirs.facts or {}
        yield from (f"another {key}, though computed alike" for key in DIGESTS if facts.get(key) != other.get(key))
    for name, value in every_score(theirs).items():
        found, bound = ours.score(name), TOLERANCE * abs(value) if is_plain(name) else SHARE_TOLERANCE
        if alike and found != value:
            yield f"{name} is {found}, not {value}, though computed alike"
        elif found is None or not (found == value or abs(found - value) <= bound):
            yield f"{name} is {found}, not {value:g} give or take {bound:.2g}"


def every_score(record: Record) -> dict[str, float]:
    return {**{f"dev/{metric}": value for metric, value in (record.dev or {}).items()}, **(record.scores or {})}
