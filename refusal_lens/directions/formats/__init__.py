"""Other projects' direction files, in and out, and how any two of them compare.

Every project counts layers and positions in its own way. What is read here comes back in this
package's words (layer `l` is `blocks.{l}.hook_resid_post`), with every translation stated; what a
file doesn't say is reported as unknown, never guessed. Files may come from strangers: nothing in
them is run, and no size they claim is believed before it is checked against the file's own.
"""

from .comparing import SIGN_FLIP, Comparison, compare, sign_flips
from .known import Directions
from .reading import read_directions
from .writing import to_steering_vector, write_control_vector, write_directions

__all__ = [
    "SIGN_FLIP",
    "Comparison",
    "Directions",
    "compare",
    "read_directions",
    "sign_flips",
    "to_steering_vector",
    "write_control_vector",
    "write_directions",
]
