"""What the server imports from which trainings are forked: all of it once, and without the warnings that a machine
without Megatron's optional libraries would show."""

from __future__ import annotations

from moetrain.runtime.logs import quiet_imports

quiet_imports()

import moetrain.train.run  # noqa: E402, F401  (filters come first)
