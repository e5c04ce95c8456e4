"""Whether a run is healthy, from its records: findings with evidence, cause and remedy. Imports no torch."""
