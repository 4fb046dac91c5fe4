"""``trueup control``: agents for Gymnasium environments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.control.presets import preset
from trueup.control.settings import ControlSettings
from trueup.errors import DataError, ModelError, SettingsError, require_extra
from trueup.runs.settings import check_range, given_value, values_from_yaml

if TYPE_CHECKING:
    import numpy as np

    from trueup.control.agent import Agent
    from trueup.control.environments import Environments


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """An agent that was trained."""

    run: str = ""
    """Run folder, one of its checkpoints, or an environment: then the newest run in runs/ that learned it."""
    env: str = ""
    """Environment, if it is not the one that was learned in."""
    sample: bool = False
    """Draw actions from the policy; otherwise the best one is taken."""
    seed: int = 0
    """The first episode begins with this seed, the next with the following one."""

    def __post_init__(self) -> None:
        check_range(self, "seed", at_least=0)
        if not self.run:
            raise SettingsError("which agent?", where="--run", way_out="a run folder, or the name of an environment")


@dataclass(frozen=True, kw_only=True)
class EvalSettings(_Trained):
    """Play episodes with a trained agent, and say what they brought."""

    episodes: int = 100
    """Episodes of each agent (one for each seed that was trained)."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "episodes", at_least=1)


@dataclass(frozen=True, kw_only=True)
class WatchSettings(_Trained):
    """Make a video of a trained agent."""

    output: str = "video.mp4"
    """File for the video: .mp4 or .gif."""
    agent: int | None = None
    """Seed of the agent, where several were trained; by default the first."""
    episodes: int = 1
    """Episodes to show."""
    max_steps: int = 1000
    """Steps after which an episode is cut off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("episodes", "max_steps"):
            check_range(self, name, at_least=1)
        if Path(self.output).suffix not in (".mp4", ".gif"):
            raise SettingsError(f"is {self.output}", where="--output", way_out="a name that ends with .mp4 or .gif")


def train_defaults(argv: Sequence[str]) -> ControlSettings | None:
    """The preset of the algorithm and the environment that the flags name; None where they name no environment."""
    env = given_value(argv, "env", ControlSettings)
    algorithm = given_value(argv, "algorithm", ControlSettings) or ControlSettings.algorithm
    if env is None:
        return None
    settings: dict[str, Any] = preset(algorithm, env)
    return ControlSettings(**settings, env=env, algorithm=algorithm)  # type: ignore[arg-type]


def train(settings: ControlSettings) -> None:
    """Train, and say where the agent lies and what it reaches."""
    import torch

    from trueup.control.train import train as train_agents

    # At these sizes threads cost more in waiting for one another than they save.
    torch.set_num_threads(1)
    result = train_agents(settings)
    print(f"run {result.folder}, agent {result.agent_folder}")
    if "eval_return" in result.metrics:
        mean, high = (result.metrics.get(name, math.nan) for name in ("eval_return", "eval_return_high"))
        spread = f" ± {high - mean:.1f} (95 % interval over {len(settings.seeds)} seeds)" if math.isfinite(high) else ""
        print(f"mean return of {settings.eval_episodes} episodes: {mean:.1f}{spread}")


def evaluate(settings: EvalSettings) -> None:
    """Print a line for each agent."""
    from trueup.cli.tables import show, table_of
    from trueup.control.environments import make_environments
    from trueup.control.evaluation import evaluate as play
    from trueup.runs.progress import RunProgress
    from trueup.runs.sampled import mean_interval

    agent = load_agent(settings.run)
    env = settings.env or agent.env
    progress = RunProgress(settings.episodes * len(agent.seeds), title="eval", quiet=settings.quiet)
    with progress:
        outcome = play(
            agent,
            lambda rows: check_fits(agent, env, make_environments(env, rows)),
            settings.episodes,
            seed=settings.seed,
            sample=settings.sample,
            progress=lambda number: progress.step(num_steps=number) if number else None,
        )
    table = table_of("seed", "mean return", "± (95 %)", "spread", "lowest", "highest", "mean length")
    for seed, returns, lengths in zip(agent.seeds, outcome.returns, outcome.lengths, strict=True):
        mean, _, high = mean_interval(returns)
        numbers = (mean, high - mean, returns.std(), returns.min(), returns.max(), lengths.mean())
        table.add_row(str(seed), *(f"{number:,.1f}" for number in numbers))
    way = "drawn from the policy" if settings.sample else "the best action"
    print(f"{env}: {agent.algorithm}, {settings.episodes} episodes of each agent, {way}")
    show(table)


def watch(settings: WatchSettings) -> None:
    """Write the video."""
    import numpy as np

    from trueup.control.environments import LocalEnvironments, as_row, flat, make_environment

    agent = load_agent(settings.run)
    wanted = agent.seeds[0] if settings.agent is None else settings.agent
    if wanted not in agent.seeds:
        raise SettingsError(
            f"there is no agent {wanted}", where="--agent", way_out=f"one of {', '.join(map(str, agent.seeds))}"
        )
    imageio = require_extra("imageio.v2", "control")
    env = settings.env or agent.env
    check_fits(agent, env, LocalEnvironments(lambda: make_environment(env), 1)).close()
    environment = flat(make_environment(env, render_mode="rgb_array"))
    rate = environment.metadata.get("render_fps", 30)
    rng = np.random.default_rng(settings.seed)
    shape = len(agent.seeds), 1
    output = Path(settings.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.stem}.part{output.suffix}")
    even = {"fps": rate, "macro_block_size": 2}  # video formats want an even number of pixels
    arguments: dict[str, Any] = even if output.suffix == ".mp4" else {"duration": 1000 / rate, "loop": 0}
    with imageio.get_writer(aside, **arguments) as video:
        for episode in range(settings.episodes):
            observation = environment.reset(seed=settings.seed + episode)[0]
            rewards: list[float] = []
            for _ in range(settings.max_steps):
                video.append_data(picture(environment))
                seen = agent.seen(np.broadcast_to(as_row(observation), (*shape, len(as_row(observation)))))
                noise = agent.actions.noise(rng, shape) if settings.sample else None
                action = agent.actions.for_environment(agent.act(seen, noise))[agent.seeds.index(wanted), 0]
                observation, reward, terminated, truncated, _ = environment.step(action)
                rewards.append(float(reward))
                if terminated or truncated:
                    break
            video.append_data(picture(environment))
            print(f"episode {episode + 1}: return {sum(rewards):,.1f} in {len(rewards):,} steps")
    environment.close()
    aside.replace(output)
    print(f"video {output}")


def check_fits(agent: Agent, env: str, environments: Environments) -> Environments:
    """The environments. Raises ``DataError`` where the agent was made for other observations or actions."""
    for what, known, shown in (
        ("sees", agent.network.num_inputs, environments.num_inputs),
        ("decides on", agent.actions.num_outputs, environments.actions.num_outputs),
    ):
        if known != shown:
            raise DataError(
                f"the agent {what} {known} numbers, {env} shows {shown}",
                where="--env",
                way_out=f"leave it out: the agent learned in {agent.env}",
            )
    return environments


def picture(environment: Any) -> np.ndarray:
    try:
        return environment.render()
    except Exception as error:  # whatever the environment's graphics make of a machine without a screen
        raise DataError(
            f"the environment can't be drawn: {error}",
            way_out="on a machine without a screen MuJoCo draws with MUJOCO_GL=egl or MUJOCO_GL=osmesa",
        ) from error


def load_agent(name: str) -> Agent:
    """The agent in a run folder or checkpoint, or of the newest run of an environment.

    Raises ``ModelError`` where there is none.
    """
    from trueup.control.agent import Agent
    from trueup.runs.checkpoint import check_checkpoint, latest_checkpoint

    path = Path(name)
    if not path.is_dir():
        configs = sorted(Path("runs").glob("*/config.yaml"), key=lambda config: config.stat().st_mtime)
        texts = {config.parent: config.read_text(encoding="utf-8") for config in configs}
        found = [run for run, text in texts.items() if values_from_yaml(text).get("env") == name]
        if not found:
            raise ModelError(
                "is neither a run folder nor an environment that a run in runs/ learned",
                where=name,
                way_out=f"trueup control train {name}",
            )
        path = found[-1]
        print(f"agent of {path}")
    checkpoint = path if (path / "manifest.json").is_file() else latest_checkpoint(path)
    if checkpoint is None:
        return Agent.load(path)
    check_checkpoint(checkpoint)
    return Agent.load(checkpoint / "model")
