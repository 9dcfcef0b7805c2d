package main

import (
	"blockferry/integration/uml"
)

// figures is everything that can be measured.
var figures = []figure{
	{
		name:    "first-sync-vs-dd",
		about:   "the first full sync of a volume against dd between the same two disks",
		disks:   []uml.Disk{{Size: syncBytes + 256<<20}, {Size: syncBytes + 256<<20}},
		measure: firstSync,
	},
	{
		name:    "tracked-vs-raw",
		about:   "a volume on which changes are marked (and all are, and replication is paused) against the bare disk",
		measure: trackedVersusRaw,
	},
	{
		name:    "era-block",
		about:   "what the grain of the kernel's mark costs, right after a cut and when all is marked",
		disks:   []uml.Disk{{Size: afterCutBytes + 768<<20}, {Size: afterCutBytes + 768<<20}, {Size: afterCutBytes}},
		measure: eraBlock,
	},
	{
		name:    "latency",
		about:   "how long a write takes while the volume is replicated, against the bare disk",
		measure: replicatingLatency,
	},
	{
		name:    "cut-stall",
		about:   "how long writers are stopped for a cut, every time they are",
		measure: cutStall,
	},
	{
		name:    "sent-per-changed",
		about:   "what travels, and what is read and written, for each byte that changed, not compressed",
		disks:   []uml.Disk{{Size: sentBytes + 768<<20}, {Size: sentBytes + 768<<20}},
		measure: sentPerChanged,
	},
	{
		name:    "agent-rss",
		about:   "memory of an agent with a volume of 1 TiB, and the time to find what changed there",
		disks:   []uml.Disk{{Size: rssBytes + 128<<30}, {Size: rssBytes + 128<<30}},
		measure: agentRSS,
	},
}
