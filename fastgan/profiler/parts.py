"""Sorts what torch.profiler recorded into the parts of a GAN's step.

An operation belongs to the innermost range around it. A node of the backward pass belongs to where its forward operation was
(autograd numbers both alike), so that the backward of the critic, of spectral norm and of a penalty are told apart inside one
call of ``backward()``. Forward time of a part is its operations and the Python between them.
"""

import bisect
from collections import defaultdict
from dataclasses import asdict, dataclass

from fastgan.profiler.record import BACKWARD, CRITIC, GENERATOR, MINIBATCH, OTHER, PENALTY, PREFIX, SPECTRAL

REST, OPTIMIZER, DATA = "the rest", "optimizer", "data"
#: in the order in which they are shown
PARTS = [
    *(f"{role} {way}" for role in (GENERATOR, CRITIC, OTHER) for way in ("forward", BACKWARD)),
    PENALTY,
    SPECTRAL,
    MINIBATCH,
    OPTIMIZER,
    DATA,
    REST,
]
_OPERATORS = {
    "fastgan::spectral": SPECTRAL,
    "fastgan::minibatch": MINIBATCH,
    "fastgan::gradient_penalty": PENALTY,
    "fastgan::tangent_combine": PENALTY,
}
_NODE = "autograd::engine::evaluate_function: "


@dataclass
class Part:
    """One part of an iteration: seconds, its share of the traced iteration, bytes it had allocated that were alive when memory
    peaked, bytes it allocated in all. ``device_seconds``: of GPU kernels, where there are any."""

    name: str
    seconds: float
    share: float
    bytes_at_peak: int
    bytes_allocated: int
    device_seconds: float = 0.0

    def to_dict(self) -> dict:
        return asdict(self)


class Sorter:
    """Which part each recorded event belongs to. ``roles``: index of a network -> role."""

    def __init__(self, events, roles: dict[int, str]):
        self.events = sorted((e for e in events if e.name != "[memory]"), key=lambda e: e.time_range.start)
        self.roles, self.part_of = roles, {}
        self.penalties = [(e.time_range.start, e.time_range.end) for e in self.events if e.name == PREFIX + PENALTY]
        self.starts = [start for start, _ in self.penalties]
        latest: dict[tuple, str] = {}  # (thread, number of a graph node) -> part of the newest operation with it
        last_node: dict[int, str] = {}
        for event in self.events:
            part = self._own(event, latest, last_node)
            if part is None:
                parent = event.cpu_parent
                part = self.part_of.get(parent.id, REST) if parent is not None else REST
            self.part_of[event.id] = part
            if event.sequence_nr >= 0 and not event.name.startswith(_NODE):
                latest[event.thread, event.sequence_nr] = part

    def _inside_penalty(self, time) -> bool:
        i = bisect.bisect_right(self.starts, time) - 1
        return i >= 0 and time < self.penalties[i][1]

    def _own(self, event, latest, last_node) -> str | None:
        name = event.name
        if name.startswith(_NODE):
            if self._inside_penalty(event.time_range.start):
                part = PENALTY
            elif event.sequence_nr >= 0 and not name.endswith("AccumulateGrad"):
                origin = latest.get((event.fwd_thread, event.sequence_nr), REST)
                part = origin.replace(" forward", f" {BACKWARD}") if origin.endswith(" forward") else origin
            else:
                part = last_node.get(event.thread, REST)
            last_node[event.thread] = part
            return part
        if name.startswith(PREFIX):
            label = name.removeprefix(PREFIX)
            if label.startswith("network "):
                return f"{self.roles.get(int(label.split()[1]), OTHER)} forward"
            return REST if label == BACKWARD else label
        if name.startswith("Optimizer."):
            return OPTIMIZER
        if name.startswith("enumerate(DataLoader)"):
            return DATA
        if name.startswith("fastgan::"):
            return next((part for start, part in _OPERATORS.items() if name.startswith(start)), None)
        return None


def _memory(tree, part_of: dict[int, str]) -> tuple[dict[str, int], dict[str, int], int]:
    """Bytes alive at the peak by part, bytes allocated by part, the peak: of what the traced operations allocated."""
    found = []

    def walk(nodes, part):
        for node in nodes:
            if hasattr(node.extra_fields, "alloc_size"):
                found.append((node.start_time_ns, node.extra_fields, part))
            walk(node.children, part_of.get(node.correlation_id, part))

    walk(tree, REST)
    on_gpu = any(fields.device.type != "cpu" for _, fields, _ in found)
    alive, held, allocated = {}, defaultdict(int), defaultdict(int)
    total = peak = 0
    at_peak: dict[str, int] = {}
    for _, fields, part in sorted(found, key=lambda entry: entry[0]):
        if on_gpu and fields.device.type == "cpu":
            continue
        if fields.alloc_size > 0:
            alive[fields.ptr] = part, fields.alloc_size
            held[part] += fields.alloc_size
            allocated[part] += fields.alloc_size
            total += fields.alloc_size
            if total > peak:
                peak, at_peak = total, dict(held)
        elif fields.ptr in alive:
            part, size = alive.pop(fields.ptr)
            held[part] -= size
            total -= size
    return at_peak, dict(allocated), peak


def sort(profiler, roles: dict[int, str], iterations: int, wall: float) -> tuple[list[Part], int]:
    """Parts per iteration, and the peak in bytes. ``wall``: seconds that all traced iterations took together."""
    events = [e for e in profiler.events() if str(e.device_type).endswith("CPU")]
    sorter = Sorter(events, roles)
    seconds, device = defaultdict(float), defaultdict(float)
    main = {e.thread for e in sorter.events if e.name.startswith((PREFIX, "Optimizer."))}
    elsewhere = any(e.name.startswith(_NODE) and e.thread not in main for e in sorter.events)
    for event in sorter.events:
        part = sorter.part_of[event.id]
        waiting = elsewhere and event.name in (PREFIX + BACKWARD, PREFIX + PENALTY)
        if (event.thread in main or elsewhere) and not waiting and part != REST:
            seconds[part] += event.self_cpu_time_total / 1e6
        device[part] += sum(kernel.duration for kernel in event.kernels) / 1e6
    seconds[REST] = max(0.0, wall - sum(seconds.values()))
    at_peak, allocated, peak = _memory(profiler.profiler.kineto_results.experimental_event_tree(), sorter.part_of)
    parts = [
        Part(
            name,
            seconds[name] / iterations,
            seconds[name] / wall if wall else 0.0,
            at_peak.get(name, 0),
            allocated.get(name, 0) // iterations,
            device[name] / iterations,
        )
        for name in PARTS
        if seconds[name] or allocated.get(name) or name == REST
    ]
    return parts, peak
