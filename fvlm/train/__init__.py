"""From `PackedBatch` to a trained checkpoint: objectives, schedule, engine, checkpoint, metrics, guard, loop."""
