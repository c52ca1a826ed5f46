"""iGRPO: two-stage GRPO with self-feedback. The functions named here are `igrpo_nemo.api`'s."""

TYPE_CHECKING = False  # type checkers know the name; importing typing would cost more than all else

if TYPE_CHECKING:
    from igrpo_nemo.api import evaluate, load_config, score, train

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load_config", "score", "train"]


def __getattr__(name: str) -> object:
    """A function of the API, imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("igrpo_nemo.api"), name)
