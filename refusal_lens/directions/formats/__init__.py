"""Direction files of other projects: read, write and compare them.

>>> comparison = formats.compare(*map(formats.read_directions, [refusal.save("r.npy")] * 2))
"""

from .compare import Comparison as Comparison
from .compare import compare as compare
from .compare import sign_flips as sign_flips
from .directions_file import Directions as Directions
from .directions_file import write_control_vector as write_control_vector
from .directions_file import write_directions as write_directions
from .load import read_directions as read_directions
