"""The options that verbs share, and settings from them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from nasdeploy.settings import BuildSettings

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")


pack_option = click.option(
    "--pack",
    type=click.Path(path_type=Path),
    metavar="FILE.zip",
    help="Measure nothing: write what a device with numpy and onnxruntime measures (python3 FILE.zip).",
)


def refuse_beside(context: click.Context, option: str, names: Collection[str]) -> None:
    """Raise UsageError for a parameter of ``names`` that was given, though it says nothing beside ``option``."""
    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE and context.params[name]
        if given and name in names:
            written = parameter.opts[-1] if isinstance(parameter, click.Option) else parameter.metavar
            raise click.UsageError(f"{written}: says nothing beside {option}; leave it out")


class SettingOption(click.Option):
    """An option that stands for one key of the settings; not given, it says nothing.

    key: dotted, as in a configuration file; left out: the name of the parameter.
    """

    def __init__(self, *arguments: Any, key: str | None = None, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.key = key or str(self.name)

    @property
    def long_name(self) -> str:
        """The name for messages, such as "--profile"."""
        return self.opts[-1]

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return name and help, with the default of the settings, which have one home."""
        record = super().get_help_record(ctx)
        default = _default_text(self.key)
        return record if record is None or not default else (record[0], f"{record[1]}  [default: {default}]")


def _default_text(key: str) -> str:
    from nasdeploy.settings import BuildSettings

    value: Any = BuildSettings()
    for part in key.split("."):
        value = getattr(value, part)
    if value is None or value is False:
        return ""
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _setting(*names: str, **attributes: Any) -> Callable[[Decorated], Decorated]:
    return click.option(*names, cls=SettingOption, default=None, **attributes)


# Choices that are no plug-ins; a test compares them with the settings' own types.
DEVICES = ("auto", "cpu", "cuda")
AUGMENTATIONS = ("none", "light", "standard")
CLASS_WEIGHTS = ("none", "balanced")
ESTIMATORS = ("importance", "doubly_robust", "independent")
EVALUATORS = ("supernet", "random-weight")
WARM_STARTS = ("none", "random-weight")
PREDICTORS = ("gaussian-process", "proxy")
PROPOSERS = ("knowledge-gradient", "evolution")

_SETTINGS_OPTIONS = (
    click.option("-c", "--config", type=click.Path(path_type=Path), metavar="TOML", help="File of settings."),
    click.option(
        "-o", "--output-dir", type=click.Path(path_type=Path), metavar="DIR", help="The run folder."
    ),
    _setting(
        "-p",
        "--profile",
        "profiles",
        multiple=True,
        metavar="NAME|TOML",
        help="Hardware profile; repeatable.",
    ),
    _setting(
        "--data",
        metavar="NAME|PATH",
        help="Data set: name, image folder, .npz, parquet, CIFAR or IDX files, or FILE.py:FUNCTION.",
    ),
    _setting(
        "--image-size",
        type=int,
        multiple=True,
        metavar="PIXELS",
        help="Resize images to squares of this side; repeated: the search chooses among them.",
    ),
    _setting("--space", metavar="NAME", help="Search space by name, or FILE.py:FUNCTION of your own."),
    _setting("--device", type=click.Choice(DEVICES), help="Where to train."),
    _setting("--threads", type=int, metavar="N", help="Threads of training on a CPU."),
    _setting("--seed", type=int, metavar="N", help="Seed of everything random."),
    _setting("--augment", type=click.Choice(AUGMENTATIONS), help="Augmentation of training images."),
    _setting(
        "--class-weights",
        type=click.Choice(CLASS_WEIGHTS),
        help="balanced: rare classes count as much as frequent ones.",
    ),
    _setting(
        "--estimator",
        key="search.estimator",
        type=click.Choice(ESTIMATORS),
        help="Pool the samples of all profiles, learn a model of the loss besides, or give each its own samples.",
    ),
    _setting(
        "--evaluator",
        key="search.evaluator",
        type=click.Choice(EVALUATORS),
        help="Judge architectures by shared weights that are trained, or in minutes by random ones.",
    ),
    _setting(
        "--warm-start",
        key="search.warm_start",
        type=click.Choice(WARM_STARTS),
        help="Let the search start from what is best with random weights.",
    ),
    _setting(
        "--predictor",
        key="search.predictor",
        type=click.Choice(PREDICTORS),
        help="Model of the losses, for the selection and for doubly_robust.",
    ),
    _setting(
        "--proposer",
        key="search.proposer",
        type=click.Choice(PROPOSERS),
        help="With doubly_robust: who proposes what is evaluated.",
    ),
    _setting("--exporter", metavar="NAME", help="What writes the ONNX file; or FILE.py:CLASS of your own."),
    _setting("--baselines/--no-baselines", help="Also a random and a narrowed network per profile."),
    _setting("--time-budget", metavar="TIME", help='Scale the schedule to this, such as "10min".'),
    _setting("--latency-from", metavar="RUN", help="Run folder whose latency tables are used again."),
    click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any setting, such as search.num_steps=200; repeatable. "
        '"nasdeploy profiles schema --of settings" lists them.',
    ),
    click.option(
        "--resume/--no-resume",
        default=True,
        help="Continue what the run folder holds (the default), or start over.",
    ),
)


def settings_options(command: Decorated) -> Decorated:
    """Give ``command`` the options of a build: config, output_dir, assignments, resume, settings."""
    for option in reversed(_SETTINGS_OPTIONS):
        command = option(command)
    return command


def verbosity_options(command: Decorated) -> Decorated:
    """Give ``command`` -v and -q, as the parameters ``verbose`` and ``quiet``."""
    command = click.option("-q", "--quiet", is_flag=True, help="Show errors only.")(command)
    return click.option(
        "-v", "--verbose", is_flag=True, help="Show the values of every step, once a second."
    )(command)


def _stored_settings(context: click.Context) -> dict[str, Any] | None:
    """Return the settings of the run that the command continues, None where there is none."""
    folder: Path | None = context.params["output_dir"]
    if folder is None or not context.params["resume"] or not (folder / "run.json").exists():
        return None
    from nasdeploy.runs import stored_settings

    return stored_settings(folder)


def read_settings(context: click.Context) -> BuildSettings:
    """Return defaults < -c FILE, or else the run that is continued < options < --set.

    Raises ConfigError, which names the source.
    """
    from nasdeploy.cli.merging import Layer, assignment_layer, file_layer, merge_layers, nested

    config: Path | None = context.params["config"]
    stored = _stored_settings(context) if config is None else None
    layers = [] if config is None else [file_layer(config)]
    if stored is not None:
        layers.append(Layer(source=str(context.params["output_dir"]), data=stored))
    for option in context.command.params:
        value = context.params.get(str(option.name))
        if isinstance(option, SettingOption) and value not in (None, ()):
            layers.append(Layer(source=option.long_name, data=nested(option.key, value)))
    layers += [assignment_layer(text) for text in context.params["assignments"]]
    return merge_layers(layers)
