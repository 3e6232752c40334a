"""Direction files of other projects: read, write and compare them.

>>> comparison = formats.compare(*map(formats.read_directions, [refusal.save("r.npy")] * 2))
"""

from .compare import Comparison, compare, sign_flips
from .directions_file import Directions, write_control_vector, write_directions
from .load import read_directions
