"""From media and shards to `PackedBatch`: video, shard, chat, plan, batch, loader."""
