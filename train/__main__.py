"""`python -m train --data DIR --out RUN`."""

from __future__ import annotations

import os
import sys
from contextlib import closing, suppress
from pathlib import Path

from models.extras import missing
from train import flags, settings
from train.progress import Lines


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code, which --help explains."""
    given, resume = flags.parse(argv)
    out = Path(given["out"])
    # torch asks Linux for huge pages then: the tensors made anew in each step cost 512 times fewer page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        # torch and transformers take seconds to import: --help and a bad flag do not wait for them.
        from torch import OutOfMemoryError

        from models.encoder import EncoderError
        from models.head import HeadError
        from train import report
        from train.checkpoint import CheckpointError
        from train.data import DataError
        from train.interrupt import StoppedError
        from train.prepare import prepare
        from train.runs import Run
        from train.tensorboard import Events
        from train.trainer import DivergedError

        run = Run(out)
        stored = run.config() if resume else None
        if stored is None:
            if resume and "data" not in given:
                raise settings.SettingsError(f"--out {out}: no run to resume")
            chosen = settings.new(given)
            if not resume:
                run.refuse_to_overwrite()
        else:
            chosen = settings.resumed(stored["settings"], given)
        trainer = prepare(chosen, run)
        if not sys.stderr.isatty():
            run.log.follow(Lines(chosen.epochs))
        try:
            with closing(Events(out / "tensorboard", run.log)):
                trainer.run()
        except BaseException:
            with suppress(report.ReportError, OSError):  # what stopped the run is what counts
                report.write([out], out / "report.html")
            raise
        report.write([out], out / "report.html")
    # These two first: the others' names are not there when an import fails or is interrupted.
    except ImportError as error:
        return _fail(missing(error, "train"), 2)
    except KeyboardInterrupt:
        return _fail("stopped at once; if a checkpoint was saved before, --resume goes on from it", 130)
    except (settings.SettingsError, DataError, EncoderError, HeadError, CheckpointError, report.ReportError, OSError) as error:
        return _fail(str(error), 2)
    except OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        hint = (
            "see --micro-batch, --gradient-checkpointing, --encoder-dtype and --head-optimizer, or give it another --batch-size"
        )
        return _fail(f"{reason}; {hint}", 2)
    except DivergedError as error:
        return _fail(str(error), 1)
    except StoppedError as stop:
        print(f"stopped by {stop}, state saved; go on with: python -m train --out {out} --resume", file=sys.stderr)
        return 128 + stop.signum
    print(f"finished: {out}; pack it for serving with: python -m export {out} --out BUNDLE")
    return 0


def _fail(message: str, code: int) -> int:
    print(f"python -m train: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log file has each line at once
    sys.exit(main())
