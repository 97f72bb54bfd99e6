"""gin, held to account: typed bindings, known names and used macros, all checked before anything is compiled.

A *stage* is a function with annotated keyword-only parameters. Whatever dataclasses its annotations mention are
configurable under their class names, and so is the stage under its own name:

    include 'models/demo.gin'          # looked for beside this file, in the working directory and in the repository
    STEPS = 500                        # an upper-case macro, for the owner to set
    RunConfig.steps = %STEPS           # a field of a dataclass
    pretrain.text = 'corpora/public'   # a parameter of the stage

A parameter without a default whose type is one of these dataclasses is built from that dataclass's bindings; where
there is a choice or a default, `train_expert.privacy = @Privacy()` asks for one. gin's scopes and imports are refused:
a file that configures must not be able to run code.
"""

from flexolmo_jax.configuration.check import check_file
from flexolmo_jax.configuration.configure import Configured, configure

__all__ = ["Configured", "check_file", "configure"]
