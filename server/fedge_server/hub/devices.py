"""What the hub serves to devices: each service of a port, with its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedge.identity import node_id_of
from fedge.wire.v1 import (
    distribution_pb2,
    distribution_pb2_grpc,
    enrolment_pb2,
    enrolment_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    link_pb2,
    link_pb2_grpc,
    telemetry_pb2,
    telemetry_pb2_grpc,
)
from fedge_server.delivery import Distribution, Shelf
from fedge_server.delivery.deltas import Deltas
from fedge_server.delivery.sealing import Sealing
from fedge_server.hub.enrolment import EnrolmentServicer
from fedge_server.hub.fleet import Fleet
from fedge_server.hub.gate import Gate
from fedge_server.hub.home import Home
from fedge_server.hub.link import LinkServicer
from fedge_server.hub.listening import describe
from fedge_server.hub.settings import Inference
from fedge_server.hub.settings import Telemetry as TelemetrySettings
from fedge_server.inference.exports import Exports, loader
from fedge_server.inference.models import Models
from fedge_server.inference.released import newest, reader
from fedge_server.inference.service import InferenceServicer
from fedge_server.registry.database import Registry
from fedge_server.repository.content_keys import ContentKeys
from fedge_server.rollout.service import Rollouts
from fedge_server.telemetry.references import references
from fedge_server.telemetry.service import TelemetryService
from fedge_server.telemetry.store import Telemetry


@dataclass(frozen=True, slots=True)
class Service:
    """One service of a port."""

    module: Any  # generated: tells its name to health and reflection
    add: Callable[[Any, Any], None]  # generated: adds a servicer to a server
    servicer: Any


def carry(server: Any, *services: Service) -> None:
    """Add services to a grpc.aio server that was not started yet, with health and reflection."""
    for service in services:
        service.add(service.servicer, server)
    describe(server, *(service.module for service in services))


def link(servicer: LinkServicer) -> Service:
    """Work for devices, and its results."""
    return Service(link_pb2, link_pb2_grpc.add_LinkServicer_to_server, servicer)


def distribution(servicer: Distribution) -> Service:
    """Releases."""
    return Service(distribution_pb2, distribution_pb2_grpc.add_DistributionServicer_to_server, servicer)


def enrolment(servicer: EnrolmentServicer) -> Service:
    """Certificates."""
    return Service(enrolment_pb2, enrolment_pb2_grpc.add_EnrolmentServicer_to_server, servicer)


def inference(gate: Gate, models: Models, settings: Inference) -> Service:
    """Answers of global models."""
    servicer = InferenceServicer(gate, models, settings.limits())
    return Service(inference_pb2, inference_pb2_grpc.add_InferenceServicer_to_server, servicer)


def telemetry(gate: Gate, store: Telemetry, fleet: Fleet) -> Service:
    """What devices count of their answers."""
    servicer = TelemetryService(gate.admit, store, lambda device: fleet.tags(node_id_of(device)))
    return Service(telemetry_pb2, telemetry_pb2_grpc.add_TelemetryServicer_to_server, servicer)


def models_of(home: Home, registry: Registry, settings: Inference) -> Models:
    """The global models that answer devices: opened when first asked for."""
    return Models(loader(Exports(home.exports), reader(registry)), newest(registry), settings.limits())


def telemetry_of(registry: Registry, settings: TelemetrySettings) -> Telemetry | None:
    """Where windows of devices are kept; None: none are taken."""
    found = references(registry, reader(registry))
    return Telemetry(registry.engine, settings.storing(), found) if settings.enabled else None


def distribution_of(
    home: Home, gate: Gate, registry: Registry, rollouts: Rollouts, shelf: Shelf
) -> Distribution:
    """The Distribution service of a home, with sealing and deltas."""
    sealing = Sealing(shelf, ContentKeys(home.keys / "content"))
    deltas = Deltas(shelf, home.deltas, content=sealing.content, seal=sealing.delta)

    def wrapped(device: str, tier: str, version: int) -> bytes | None:
        return sealing.key_for(registry.devices, device, tier, version)

    return Distribution(gate, rollouts, shelf, keys=wrapped, deltas=deltas)
