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
		name:    "first-sync-natively",
		about:   "a first full sync within one process, on loop devices, against dd between the same two",
		disks:   []uml.Disk{{Size: syncBytes + 64<<20}, {Size: syncBytes + 64<<20}},
		native:  true,
		measure: firstSyncNatively,
	},
	{
		name:  "stream-vs-tcp",
		about: "what goes through a session over loopback, from a device in memory to a replica in memory, against one plain TCP connection",
		note: "Beside what the plain connection does, the session's two ends copy each byte out of the source and into the replica, compute a checksum and check it. " +
			"The journaled way writes each byte three times, reads it once and checks it three times more. One session is one stream. On a quiet machine its two ends keep 1.8 of 2 processors busy: 37 % of that in the socket's system calls, " +
			"34 % copying (half of it what reading the source and writing the replica are here, in memory), 18 % in checksums; a second stream would find no processor to run on.",
		disks:   []uml.Disk{}, // all in memory
		native:  true,
		measure: streamVersusTCP,
	},
	streamOver(time.Millisecond),
	streamOver(5 * time.Millisecond),
	{
		name:    "tracked-vs-raw",
		about:   "a volume on which changes are marked (and all are, and replication is paused) against the bare disk",
		measure: trackedVersusRaw,
	},
	{
		name:    "tracked-vs-raw-debian",
		about:   "the same as tracked-vs-raw on Debian's kernel, with fine tracking besides",
		debian:  true,
		limit:   20 * time.Minute,
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
			"random write of this load is the first to its block, so that half of the bare disk's rate is more than the volume takes: a latency then is that of a writer at its limit, and says so. A 99th percentile below 30 ms says little with a clock that ticks every 10 ms.",
		measure: replicatingLatency,
	},
	{
		name:  "cut-stall",
		about: "how long writers are stopped for a cut, every time they are",
		note: "Once for the cut, when the frozen view is put in place, and once more when it is released. The guest's clock ticks every 10 ms and its kernel does not preempt, so a stop that has to " +
			"wait for a process to run (the dead-man, above all) is as long as the others' time slices. A run under load has five to eight cuts only, so that its 99th percentile is its longest stop; " +
			"of all runs together it would be near the largest in the column 'to'.",
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
	{
		name:    "native-control",
		about:   "two equal loop devices against each other: how far from 1 the machine itself takes a ratio",
		disks:   []uml.Disk{{Size: volumeBytes}, {Size: volumeBytes}},
		native:  true,
		measure: nativeControl,
	},
	{
		name:  "mark-ns",
		about: "what it costs a write to be marked: the time in the kernel's programs",
		note: "The kernel's own count, its two looks at the clock in part included. A program is run for each write of the machine, and for those of other devices finds that they are none of its own. " +
			"Nothing has been lost when this begins: after the first completion that was, each write is marked when it begins, too.",
		disks:   []uml.Disk{{Size: attachedBytes + 160<<20}, {Size: attachedBytes + 512<<20}, {Size: attachedBytes + 160<<20}},
		native:  true,
		measure: markCost,
	},
	{
		name:  "attach-vs-raw-randwrite",
		about: "a file on a mounted device that blockferry is attached to against one on the same kind of device that it is not, both written with O_DIRECT",
		note: "While tracking is measured the kernel's programs look at the other device's writes, too, and find that they are none of theirs. The writer, the agent and the replica share the machine's two CPUs " +
			"with the loop devices' own threads, and a write to these disks takes as long as copying it in memory: what the agent does in the meantime shows as it would on no real disk.",
		disks:   []uml.Disk{{Size: attachedBytes + 160<<20}, {Size: attachedBytes + 512<<20}, {Size: attachedBytes + 160<<20}},
		native:  true,
		picture: ratios("attach-vs-raw-randwrite", "Writers on an attached device, over the bare one", ""),
		measure: attachedVersusRaw,
	},
	{
		name:  "attach-cut-stall",
		about: "the longest gap that writers saw during a cut of an attached device against that of a bare FIFREEZE and FITHAW of the same file system, both after a syncfs",
		note: "Two writers, each of 4 KiB at random and then 1 ms of nothing; the gap is the longest between the ends of two writes of one. Its own stop is what the agent says that the file system was frozen for. " +
			"The bare freeze is of the same file system with the agent paused.",
		disks:   []uml.Disk{{Size: 480 << 20}, {Size: 1 << 30}},
		native:  true,
		measure: attachCutStall,
	},
	{
		name:  "first-sync-vs-rsync",
		about: "the first full sync of a volume against rsync and nbdcopy of the same device, and of the files on it",
		note: "The volume of 1 GiB holds an ext4 with 864 MiB of files; a first sync copies all of it, rsync of the files only those. Source and target are forgotten by the page cache before each run. " +
			"rsync and nbdcopy only copy: what changes meanwhile makes theirs no point in time, and they need no checksums.",
		disks:   []uml.Disk{{Size: syncBytes + 256<<20}, {Size: syncBytes + 256<<20}},
		picture: ratios("first-sync-vs-rsync", "How many times as fast a first sync is", ""),
		limit:   20 * time.Minute,
		measure: firstSyncVersusRsync,
	},
	{
		name:  "cpu-per-gib",
		about: "CPU time and memory that the first copy takes, beside rsync and nbdcopy, and to keep it up with changes, beside rsync in a loop",
		note: "The whole guest's CPU time counts all that is not idle, the kernel's threads included, in ticks of 10 ms. nbdcopy and a first sync read and write past the page cache or not as they please; memory is that of the processes, not of the page cache. " +
			"The changes are those of lag-vs-lsyncd, to files of 240 MiB on ext4; rsync copies a file that changed as a whole, which its way with local files is. The threads that write the file systems' pages back count for both sides.",
		disks:   []uml.Disk{{Size: syncBytes + 256<<20}, {Size: syncBytes + 256<<20}, {Size: lagBytes}, {Size: lagBytes}},
		picture: ratios("cpu-per-gib", "What blockferry takes, over what others take", ""),
		limit:   20 * time.Minute,
		measure: cpuPerGiB,
	},
	{
		name:  "lag-vs-lsyncd",
		about: "how old the oldest write is that is not on the copy yet, under a load that goes on, beside lsyncd and rsync in a loop",
		note: "Four writers overwrite the pages of a file of 60 MiB each on ext4; nine writes of ten are of 4 KiB and the others of up to 128 KiB, and each writer makes 64 at a time durable (fdatasync), so that it does not mostly wait for that. " +
			"At first the load is raised by a quarter each time, or lowered, until the writers don't reach it or the lag grows: sustained is what is committed under the last one before. The load whose lag is measured writes half as many bytes a second; the rows NAME-load say whether its writers did. " +
			"The rows sustained-cpus tell what processors did under it; what is neither the agent's nor the writers' is the kernel's threads for disks and write-back. With all processors busy it is they that are the limit, the writers' share included. " +
			"After each 64 writes the file is closed, since lsyncd by default copies a file only when it is closed. A write counts as arrived for blockferry when an epoch that holds it is committed, for the others " +
			"when its number can be read in the copy, durable or not, and though what is beside it may be older or newer: theirs is no point in time. The rows are stretches of one run, one after another.",
		disks:   []uml.Disk{{Size: lagBytes + 512<<20}, {Size: lagBytes + 512<<20}, {Size: lagBytes}, {Size: lagBytes}},
		limit:   45 * time.Minute,
		picture: lagPicture("lag-vs-lsyncd"),
		measure: lagVersusLsyncd,
	},
	{
		name:  "lag-natively",
		about: "the same on this machine's kernel, an attached device beside what lsyncd and rsync copy",
		note: "The load is that of lag-vs-lsyncd. The writer, the agent, the replica and the loop devices' threads share the machine's two CPUs. Bytes behind are all that were written from the oldest write on that has not arrived, " +
			"also those of later writes that have: for a replica that takes cuts whole it is what it lacks.",
		disks:   []uml.Disk{{Size: lagBytes}, {Size: lagBytes + 512<<20}, {Size: lagBytes}, {Size: lagBytes}},
		native:  true,
		limit:   45 * time.Minute,
		picture: lagPicture("lag-natively"),
		measure: lagNatively(true, laggings),
	},
	{
		name:    "lag-natively-4k",
		about:   "the same as lag-natively with writes of 4 KiB alone",
		note:    "Of the others the one that is ahead of the rest in lag-natively.",
		disks:   []uml.Disk{{Size: lagBytes}, {Size: lagBytes + 512<<20}, {Size: lagBytes}, {Size: lagBytes}},
		native:  true,
		limit:   45 * time.Minute,
		picture: lagPicture("lag-natively-4k"),
		measure: lagNatively(false, []lagging{rsyncInALoop}),
	},
	{
		name:  "tracked-vs-drbd-a",
		about: "writers on a volume, while its changes are marked and while it is replicated, against DRBD 8.4 and md RAID1 with write-behind in the same guest",
		note: "DRBD has no state in which it marks and does not send but that without a connection. Beside a volume whose changes are marked (all are) while its replication is paused there are both: drbd-a, which replicates, and drbd-alone, which marks. " +
			"DRBD replicates to a second guest, with a CPU of its own, over a bridge; blockferry to a second disk in the guest itself, whose one CPU the writer, the agent and the replica share. " +
			"md writes to a second disk, too. On the other side is what a commit holds, for blockferry, and what was written to the other disk, flushed or not, for the others. " +
			"A latency at a part of the bare disk's rate is one write's, without waiting for its turn at that rate; where the rate was not reached it is that of a writer at its limit, and says so.",
		disks:     peerDisks,
		peerDisks: []uml.Disk{{Size: volumeBytes + 32<<20}},
		limit:     30 * time.Minute,
		picture:   ratios("tracked-vs-drbd-a", "Writers at full speed on a volume, over DRBD 8.4 protocol A", "-over-drbd-a"),
		measure:   trackedVersusDRBD,
	},
	{
		name:  "tracked-vs-drbd-a-debian",
		about: "the same on Debian's kernel, with fine tracking and either image",
		note: "Both guests are emulated and share this machine's two CPUs: a packet or an interrupt costs far more than on a machine, which falls on DRBD above all. The era begins anew once a minute only, and each of its " +
			"blocks is written once before a run, as it is for all but the first moments of that minute.",
		disks:     peerDisks,
		peerDisks: []uml.Disk{{Size: volumeBytes + 32<<20}},
		debian:    true,
		limit:     60 * time.Minute,
		picture:   ratios("tracked-vs-drbd-a-debian", "Writers at full speed on a volume, over DRBD 8.4 protocol A", "-over-drbd-a"),
		measure:   trackedVersusDRBD,
	},
	{
		name:  "cut-stall-debian",
		about: "how long writers are stopped for a cut on Debian's kernel, with fine tracking and either image",
		note: "Emulated, a system call takes some ten times as long as on a machine, and a process that two busy ones stand before waits longer. " +
			"With `image: pre-copy` there is no view to release; what is left to read is read inside.",
		debian:  true,
		limit:   15 * time.Minute,
		measure: cutStall,
	},
	{
		name:    "sent-per-changed-debian",
		about:   "the same as sent-per-changed on Debian's kernel, where changes are tracked to 4 KiB",
		disks:   []uml.Disk{{Size: sentBytes + 768<<20}, {Size: sentBytes + 768<<20}},
		debian:  true,
		limit:   15 * time.Minute,
		measure: sentPerChanged,
	},
	{
		name:  "primary-to-first-write",
		about: "how long after 'blockferry primary' on a copy the volume takes its first write",
		note: "Two agents in one guest, on its one CPU, where starting the command takes a good part of the time. Before each run 1 MiB, in blocks of 4 KiB, was written that the copy had, and, forced, as much " +
			"that perhaps it had not. With 256 MiB pending the copy's agent is stopped (SIGSTOP) as soon as its superblock says that it committed them, and goes on when 'primary' is called: all of it is read from the journal, written to its places and flushed before the disk is the volume's.",
		limit:   20 * time.Minute,
		measure: primaryToFirstWrite,
	},
	{
		name:  "resync-bytes",
		about: "what is sent to a peer that was away for 1, 10 and 60 minutes",
		note: "The load is one of 100 writes of 4 KiB a second to a file of 384 MiB on an attached device, four of five to a fifth of it. Time is compressed: the peer's agent is stopped, as many writes as that load makes in " +
			"those minutes are made as fast as they go, and it is started again. What was written more than once is sent once.",
		disks:   []uml.Disk{{Size: 512 << 20}, {Size: 2 << 30}},
		native:  true,
		limit:   20 * time.Minute,
		measure: resyncBytes,
	},
	planFigure(1, "1000M", 10*time.Minute),
	planFigure(4, "1500M", 20*time.Minute),
	planFigure(16, "4000M", 40*time.Minute),
}

// planSizes are those volumes, in TiB.
var planSizes = []int64{1, 4, 16}
