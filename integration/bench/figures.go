package main

import (
	"time"

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
		name:   "first-sync-natively",
		about:  "a first full sync within one process, on loop devices over files in memory, against dd between the same two",
		native: true, measure: firstSyncNatively,
	},
	{
		name:  "stream-vs-tcp",
		about: "what goes through a session over loopback, from a device in memory to a replica in memory, against one plain TCP connection",
		note: "Beside what the plain connection does, the session's two ends copy each byte out of the source and into the replica, compute a checksum and check it. " +
			"The journaled way writes each byte three times, reads it once and checks it three times more.",
		native: true, measure: streamVersusTCP,
	},
	{
		name:    "tracked-vs-raw",
		about:   "a volume on which changes are marked (and all are, and replication is paused) against the bare disk",
		measure: trackedVersusRaw,
	},
	{
		name:  "era-block",
		about: "what the grain of the kernel's mark costs, right after a cut and when all is marked",
		note: "Right after a cut the first write to each block waits for a commit of the kernel's marks; larger blocks are all marked sooner, on a volume as small as this one. " +
			"The other side is in sent-per-changed: what must be read from the SSD and from the replica to tell what changed grows with the block. " +
			"The default is 64 KiB, the smallest: at 1,000 random writes a second it has 64 MB/s read from the replica, which a common EBS volume gives; 256 KiB would need four times that. " +
			"A volume whose writes stay close together, or one with a fast replica, is better off with a larger `era-block`.",
		disks:   []uml.Disk{{Size: afterCutBytes + 768<<20}, {Size: afterCutBytes + 768<<20}, {Size: afterCutBytes}},
		limit:   20 * time.Minute,
		measure: eraBlock,
	},
	{
		name:  "latency",
		about: "how long a write takes while the volume is replicated, against the bare disk",
		note: "The agent that replicates, the replica and the writer share the guest's one CPU, which no machine with an instance store has; and at one cut a second nearly every " +
			"random write of this load is the first to its block. A 99th percentile below 30 ms says little with a clock that ticks every 10 ms.",
		measure: replicatingLatency,
	},
	{
		name:  "cut-stall",
		about: "how long writers are stopped for a cut, every time they are",
		note: "Once for the cut, when the frozen view is put in place, and once more when it is released. The guest's clock ticks every 10 ms and its kernel does not preempt, so a stop that has to " +
			"wait for a process to run (the dead-man, above all) is as long as the others' time slices.",
		measure: cutStall,
	},
	{
		name:    "sent-per-changed",
		about:   "what travels, and what is read and written, for each byte that changed, not compressed",
		disks:   []uml.Disk{{Size: sentBytes + 768<<20}, {Size: sentBytes + 768<<20}},
		measure: sentPerChanged,
	},
	{
		name:  "agent-rss",
		about: "memory of an agent with a volume of 1 TiB, and the time to find what changed there",
		note: "The disks are sparse and begin as what a restore leaves of an empty volume. Each time is that of a new session's question about the same marks; " +
			"then what is marked is sent, for at most 25 s.",
		disks:   []uml.Disk{{Size: rssBytes + 128<<30}, {Size: rssBytes + 128<<30}},
		measure: agentRSS,
	},
}
