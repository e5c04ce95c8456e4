"""All faults. The second half was first tried once the thresholds of the rules were fixed; three came later."""

from cases import Fault
from injections import data, further, loss, machine, optimizer, ranks, routing, schedule

FIRST_HALF: tuple[Fault, ...] = (*routing.FAULTS, *loss.FAULTS)
SECOND_HALF: tuple[Fault, ...] = (
    *data.FAULTS,
    *schedule.FAULTS,
    *machine.FAULTS,
    *optimizer.FAULTS,
    *further.FAULTS,
)
LATER: tuple[Fault, ...] = ranks.FAULTS
FAULTS = (*FIRST_HALF, *SECOND_HALF, *LATER)
