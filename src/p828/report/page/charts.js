"use strict";
// Which charts there are. `columns` are a run's, as report/series.py names them; `of` makes a chart for the run in
// focus only; `map` computes what is shown of a number; `points` takes a point for each evaluation.

const PARTS = ["embedding", "attention", "sinks", "router", "routed_experts", "shared_experts", "norms", "head"];
const GIGA = 1e9;

const CHARTS = [
  { id: "loss", title: "Loss", unit: "nats", columns: [["loss", "training"]], points: (loss) => loss },
  {
    id: "perplexity", title: "Perplexity", log: true, columns: [["loss", "training"]],
    map: (loss) => Math.min(Math.exp(loss), 1e12), points: (loss) => Math.min(Math.exp(loss), 1e12),
  },
  { id: "grad_norm", title: "Gradient norm before clipping", log: true, columns: [["grad_norm", "norm"]], thresholds: true },
  { id: "lr", title: "Learning rate", columns: [["lr", "rate"]] },
  { id: "speed", title: "Throughput", unit: "tokens/s", columns: [["tokens_per_second", "tokens/s"]] },
  {
    id: "time", title: "Where a step's time went", unit: "s", log: true,
    columns: [["seconds", "step"], ["data_seconds", "waiting for data"], ["host_seconds", "GPU not at work"]],
  },
  { id: "mfu", title: "Model FLOPs utilisation", unit: "%", columns: [["mfu", "MFU"]], map: (share) => share * 100 },
  {
    id: "memory", title: "Peak memory", unit: "GB", columns: [["memory_bytes", "largest rank"], ["rank_memory_least", "smallest rank"]],
    map: (bytes) => bytes / GIGA,
  },
  {
    id: "disk", title: "Free disk", unit: "GB", columns: [["disk_free_bytes", "free"]], map: (bytes) => bytes / GIGA,
  },
  {
    id: "balance", title: "Balance: entropy of the loads, 1 is even", columns: [["balance", "mean of layers"], ["balance_least", "worst layer"]],
  },
  {
    id: "shares", title: "An expert's load over an even share", log: true,
    columns: [["max_share", "greatest"], ["min_share", "least"]],
  },
  { id: "starved", title: "Experts under a tenth of an even share", columns: [["starved", "experts"]] },
  { id: "router", title: "Router: entropy of the scores, 1 tells no expert apart", columns: [["router_entropy", "mean of layers"]] },
  { id: "bias", title: "Largest balance bias", columns: [["bias_max", "bias"]] },
  { id: "aux", title: "Auxiliary loss", columns: [["aux_loss", "loss"]] },
  {
    id: "part_norms", title: "Gradient norm by part", of: "focus", log: true,
    columns: PARTS.map((part) => [`grad_norms.${part}`, part]),
  },
  {
    id: "part_updates", title: "Update over weights by part", of: "focus", log: true,
    columns: PARTS.map((part) => [`update_ratios.${part}`, part]),
  },
  { id: "sources", title: "Tokens of each source", of: "focus", columns: [], prefix: "source_tokens." },
];

// The chart that a finding is about, by words in its rule's name; the loss for all others.
const CHART_OF_RULE = [
  [/grad|norm_of|expert_gradient/, "grad_norm"], [/router|load|bias|balanc|reroute/, "balance"],
  [/aux/, "aux"], [/learning_rate|warmup|schedule/, "lr"], [/memory/, "memory"], [/disk/, "disk"],
  [/host|data_starved|recompil|slow|hang/, "time"], [/update|frozen/, "part_updates"],
];

function chartOfRule(rule) {
  return (CHART_OF_RULE.find(([pattern]) => pattern.test(rule)) ?? [null, "loss"])[1];
}
