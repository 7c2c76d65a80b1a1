"""Every error Octavo raises on purpose, one tree.

    OctavoError
    ├── ConfigError (ValueError)              a setting is wrong or contradicts another
    │   ├── UnknownNameError                  no component of that name
    │   └── UnavailableComponentError         the named component cannot serve here; quotes its reasons
    ├── PluginError (RuntimeError)            a plugin broke its contract
    ├── ModelNotFoundError (ValueError)       no such folder, file or Hugging Face id
    ├── CheckpointError (ValueError)          files are there but cannot be read as a model
    ├── AdapterError (ValueError)             a LoRA adapter that cannot be served
    ├── RequestError (ValueError)             a request that can never be served
    ├── ShapeError (ValueError)               tensors that do not fit together
    └── EngineDeadError (RuntimeError)        the engine stopped; the cause is chained

Messages say what was wanted, what was found and what to do.
"""


class OctavoError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(OctavoError, ValueError):
    """A setting is wrong or contradicts another."""


class UnknownNameError(ConfigError):
    """No installed component has the name that was asked for."""


class UnavailableComponentError(ConfigError):
    """A component exists but cannot serve what was asked; the message quotes its reasons."""


class PluginError(OctavoError, RuntimeError):
    """A plugin broke its contract: import failed, wrong return type, wrong API version."""


class ModelNotFoundError(OctavoError, ValueError):
    """No such folder, file or Hugging Face id, or no network to fetch it."""


class CheckpointError(OctavoError, ValueError):
    """The model's files are there but cannot be read as a model."""


class AdapterError(OctavoError, ValueError):
    """A LoRA adapter cannot be served: its files, or what they were trained for, do not fit; or it is not known."""


class RequestError(OctavoError, ValueError):
    """A request that can never be served: empty, too long, contradictory parameters."""


class ShapeError(OctavoError, ValueError):
    """Tensors that do not fit together."""


class EngineDeadError(OctavoError, RuntimeError):
    """The engine has stopped and takes no more requests; the cause is chained."""
