"""All faults: the first half was written before the thresholds of the rules were fixed, the second after it."""

from cases import Fault
from injections import loss, routing

FIRST_HALF: tuple[Fault, ...] = (*routing.FAULTS, *loss.FAULTS)
SECOND_HALF: tuple[Fault, ...] = ()
FAULTS = (*FIRST_HALF, *SECOND_HALF)
