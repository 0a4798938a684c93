"""The corpora of a run, opened and checked against the configuration before any process group exists."""

from data import DataError, PackedSamples
from hysparse.config import Config
from hysparse.report import count


class RunData:
    """Training and validation windows of every phase."""

    def __init__(self, config: Config):
        self.config, sources = config, list(config.data.blend.items()) or [(config.data.path, 1.0)]
        if not config.data.path and not config.data.blend:
            raise DataError(
                "data.path is not set: give data.path=FOLDER, made by python -m data.prepare input=TEXT output=FOLDER"
            )
        self.train, self.validation = [], []
        for index, phase in enumerate(config.phases.values()):
            common = {"sequence_length": phase.sequence_length, "mask_documents": config.data.mask_documents}
            self.train.append(PackedSamples(sources, "train", seed=config.run.seed + index, **common))
            if config.logging.validate_every:
                self.validation.append(self._held_out(sources, common))
        needed, vocabulary = self.train[0].vocabulary, config.model.vocabulary
        if needed > vocabulary:
            raise DataError(
                f"the tokenizer of {sources[0][0]} has {needed} tokens, model.vocabulary={vocabulary} is smaller; use "
                f"model.vocabulary={-(-needed // 128) * 128} or prepare the corpus with a smaller tokenizer"
            )
        for name, phase, samples in zip(config.phases, config.phases.values(), self.train, strict=True):
            if sum(samples.windows) < phase.global_batch:
                raise DataError(
                    f"the corpus has {sum(samples.windows)} sequences of phases.{name}.sequence_length="
                    f"{phase.sequence_length}, fewer than one batch (phases.{name}.global_batch={phase.global_batch}); "
                    "prepare more text or make the batch smaller"
                )

    @staticmethod
    def _held_out(sources: list, common: dict) -> PackedSamples:
        try:
            return PackedSamples(sources, "validation", seed=0, ordered=True, **common)
        except DataError as error:
            raise DataError(f"{error}; or train without validation: logging.validate_every=0") from error

    def validation_sizes(self, ranks: int) -> list[int]:
        """How many held-out sequences one evaluation takes in each phase; empty without validation.

        Multiples of what `ranks` processes compute at once: a micro-batch on each stage of each pipeline.
        """
        parallel, wanted, sizes = self.config.parallel, self.config.data.validation_samples, []
        for (name, phase), held_out in zip(self.config.phases.items(), self.validation, strict=False):
            there, share = sum(held_out.windows), ranks // (parallel.tensor * parallel.context) * phase.micro_batch
            if there < share:
                raise DataError(
                    f"the held-out data have {there} sequences of phases.{name}.sequence_length="
                    f"{phase.sequence_length}, evaluation on {ranks} ranks with phases.{name}.micro_batch="
                    f"{phase.micro_batch} needs {share}; prepare the corpus with a larger validation=, or set "
                    "logging.validate_every=0"
                )
            sizes.append(max(share, min(wanted, there) // share * share))
        return sizes

    @property
    def fingerprint(self) -> str:
        """Of what decides the order of the tokens and what each may see."""
        return self.train[0].fingerprint + ("" if self.config.data.mask_documents else "-unmasked")

    def described(self) -> list[str]:
        """A line a phase: how often the corpus is seen."""
        return [
            f"  {name}: {count(sum(samples.windows) * phase.sequence_length)} tokens in the corpus, "
            f"seen {phase.tokens / (sum(samples.windows) * phase.sequence_length):.2g} times"
            for (name, phase), samples in zip(self.config.phases.items(), self.train, strict=True)
        ]
