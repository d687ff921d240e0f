"""The base class of a repository's benchmark scripts, which import it from here."""

from kernelhub.benchmark import Benchmark

__all__ = ["Benchmark"]
