"""A strict double of the dstack VMM, written from the documented behaviour of its versions alone.

It shares no code with the validator's client or with the local VMM, so that neither is proved against itself.
"""

from tests.dstack_double.behaviour import VERSIONS, Behaviour, behaviour
from tests.dstack_double.faults import Fault
from tests.dstack_double.host import Boot, Host
from tests.dstack_double.server import DstackDouble, Running

__all__ = ["VERSIONS", "Behaviour", "Boot", "DstackDouble", "Fault", "Host", "Running", "behaviour"]
