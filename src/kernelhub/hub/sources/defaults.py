"""The sources that the settings name, in the order in which they are asked."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from kernelhub.core.refs import RepoId
from kernelhub.errors import context
from kernelhub.hub.addresses import BUNDLES, BUNDLES_ADDRESS, CLAIMED_ADDRESS, endpoint_address, hub_address
from kernelhub.hub.sources.base import Source
from kernelhub.hub.sources.deferred import Deferred
from kernelhub.hub.sources.local import local_source
from kernelhub.hub.sources.project import Building, ProjectSource
from kernelhub.hub.store import Store
from kernelhub.hub.telemetry import UserAgent, user_agent
from kernelhub.settings import Settings


def building_of(settings: Settings) -> Building:
    """How kernels are compiled here when they are asked for."""
    return Building(settings.build, settings.cache_folder / "build", settings.cxx, settings.cuda_home)


def default_sources(settings: Settings, agent: UserAgent = None) -> list[Source]:
    """Local overrides, the embedded hub, the hubs of the settings, the Hugging Face Hub."""

    def header() -> str:
        return user_agent(enabled=settings.telemetry, caller=agent)

    def layout(url: str) -> Source:
        from kernelhub.hub.sources.layout import LayoutSource

        return LayoutSource(url, header)

    def bundle(folder: Path, *, claims: bool) -> Source:
        from kernelhub.hub.bundles import settle
        from kernelhub.hub.sources.bundle import BundleSource

        settle(Store(settings.cache_folder))
        return BundleSource(str(folder), header, claims=claims)

    def hugging_face() -> Source:
        from kernelhub.hub.sources.huggingface import HuggingFaceSource

        return HuggingFaceSource(settings.hf_endpoint, header)

    building = building_of(settings)
    found: list[Source] = []
    for name, path in settings.local_kernels:
        with context(f"LOCAL_KERNELS: {name}={path}"):
            found.append(local_source(path, RepoId.parse(name), building)[0])
    found.append(ProjectSource.embedded(building))
    bundles = settings.cache_folder / BUNDLES
    bundled = bundles.joinpath("hub.json").is_file()
    if bundled:  # before hubs: what is here needs no network
        found.append(Deferred(BUNDLES_ADDRESS, partial(bundle, bundles, claims=False)))
    found += [Deferred(hub_address(url), partial(layout, url)) for url in settings.hubs]
    found.append(Deferred(endpoint_address(settings.hf_endpoint), hugging_face))
    if bundled:  # after them: a bundle may claim that what it has is a commit of theirs
        found.append(Deferred(CLAIMED_ADDRESS, partial(bundle, bundles, claims=True)))
    return found
