"""Everything that imports ray: reaching a cluster, actors and their pool, decisions on failure."""
