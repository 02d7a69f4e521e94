from engine.lane_stream import LaneStream as LaneStream
from engine.lane_stream import Outbox as Outbox
