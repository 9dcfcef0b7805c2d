package main

import (
	"path"
	"strings"
)

// goals are what rows should reach, by FIGURE/ROW (see path.Match); the first that fits
// counts.
var goals = []struct {
	rows string
	goal goal
}{
	{"first-sync-vs-dd/*-whole", goal{}},
	{"first-sync-vs-dd/*", goal{AtLeast: 0.85}},
	{"first-sync-natively/loop-devices", goal{AtLeast: 0.85}},
	{"first-sync-vs-rsync/rsync-files", goal{AtLeast: 2}},
	{"first-sync-vs-rsync/rsync-device", goal{AtLeast: 2}},
	{"tracked-vs-raw*/4k-fdatasync", goal{AtLeast: 0.9}},
	{"tracked-vs-raw*/*", goal{AtLeast: 0.95}},
	{"attach-vs-raw-randwrite/tracking/4k-fdatasync", goal{AtLeast: 0.9}},
	{"attach-vs-raw-randwrite/tracking/*", goal{AtLeast: 0.95}},
	{"attach-cut-stall/*", goal{AtMost: 1.3}},
	{"cut-stall/*/both-p99", goal{AtMost: 20}},
	{"cut-stall-debian/*/both-p99", goal{AtMost: 20}},
	{"cut-stall-debian/pre-copy/*/both-p99", goal{AtMost: 20}},
	{"sent-per-changed/*/sent", goal{AtMost: 1.1}},
	{"sent-per-changed-debian/*/sent", goal{AtMost: 1.1}},
	{"agent-rss/rss", goal{AtMost: 200}},
	{"agent-rss/rss-peak", goal{AtMost: 200}},
	{"lag-*/blockferry", goal{AtMost: 2}},
	{"lag-*/blockferry-with-void-epochs", goal{AtMost: 2}},
	{"lag-*/blockferry-p99", goal{AtMost: 2}},
	{"tracked-vs-drbd-a*/*/*-over-drbd-a", goal{AtLeast: 1}},
	{"tracked-vs-drbd-a*/tracking/*-over-drbd-alone", goal{AtLeast: 1}},
	{"tracked-vs-drbd-a*/half-*/*-over-drbd-a-p50", goal{AtMost: 1}},
	{"tracked-vs-drbd-a*/half-*/*-over-drbd-a-p99", goal{AtMost: 1}},
	{"primary-to-first-write/forced", goal{AtMost: 2}},
	{"primary-to-first-write/forced/pending", goal{AtMost: 2}},
}

// goalOf is what a row should reach; nil if nothing is wanted of it.
func goalOf(figure, row string) *goal {
	for _, g := range goals {
		if fits, err := path.Match(g.rows, figure+"/"+row); err == nil && fits {
			if g.goal == (goal{}) {
				return nil
			}
			return &g.goal
		}
	}
	return nil
}

// reasons say why a figure may fall short, by the beginning of FIGURE/ROW; the
// first that fits counts.
var reasons = []struct{ prefix, why string }{
	{"first-sync-vs-dd/", "With disks as fast as memory the guest's one CPU is the limit: dd only has the kernel copy, while a first sync also computes a checksum of all it sends and checks it at the replica. With two CPUs: first-sync-natively."},
	{"tracked-vs-raw-debian/", "Emulated, an instruction costs some ten times as much as on a machine: the mappings' and the programs' CPU time shows beside that of a disk in the host's memory."},
	{"tracked-vs-raw/", "Four mappings, dm-era's look at its bitmap among them, stand between the volume and the disk where the bare disk has one: some microseconds of CPU for each write, which show because a write to these disks takes no longer than some tens."},
	{"sent-per-changed/", "Without fine tracking checksums of all that is marked travel, too, to tell what of it changed: the larger the era's blocks, the more. The default is 64 KiB."},
	{"lag-vs-lsyncd/", "The writers, the agent and the replica share the guest's one emulated CPU: the rows sustained-cpus say how. How long an epoch takes from its cut to its commit is in the row blockferry-cut-to-commit; what is left is the interval. With two real ones: lag-natively."},
	{"lag-natively", "How long an epoch takes from its cut to its commit is in the row blockferry-cut-to-commit. Beyond that and the interval a longer lag is that of an epoch in which not all writes had been seen by the kernel's programs, so that more was read, or all compared: on this machine's kernel none of them is run, " +
		"nor counted as missed, for 1 to 4 ms after its first process ran on that CPU, once or twice a minute at thousands of writes a second."},
	{"attach-cut-stall/", "Most of a cut's own stop is FIFREEZE itself (row freezing, beside inside and thawing), and of that nearly all is spent waiting for RCU: of samples of its kernel stack, taken during 60 freezes under such writers, 87 % were in synchronize_rcu, on ext4 as on XFS. " +
		"The kernel waits for a grace period at each of three gates that it closes to writers; the raw numbers go in steps of 8.3 ms, so the ratio moves in steps of a fourth."},
	{"tracked-vs-drbd-a/tracking/", "With nothing sent, a write to DRBD passes one driver, here four mappings as in tracked-vs-raw: some microseconds of CPU for each, on disks to which a write takes no longer than some tens."},
	{"tracked-vs-drbd-a/", "Each machine is one emulated CPU. DRBD sends a write from the kernel, as it comes; here the writer shares that CPU with an agent that cuts each second, and without fine tracking nearly every write at random " +
		"is the first to its block since the cut and waits for a commit of the era's marks. With fine tracking, which this guest's kernel has not, an era lasts a minute, and most writes find their block marked."},
	{"cut-stall/", "The guest has one CPU, its clock ticks every 10 ms and its kernel does not preempt: a stop waits for several processes' turns, each as long as what others make of theirs. Its longest single write to the bare disk took about half of 20 ms, or more, in the same runs (the raw numbers of outside/longest-write). With two CPUs: cut-stall-debian."},
	{"cut-stall-debian/pre-copy/", emulatedStall + "What was written since the last round is read inside, too: under load that is the longest part."},
	{"cut-stall-debian/", emulatedStall + "The longest part is the exchange of the base's table, for the cut and again for the release of its view: each waits for four of the kernel's grace periods, which take a turn of " +
		"several of its threads. Expedited grace periods were tried on a busy host: no difference could be told from the noise."},
	{"agent-rss/", "See which part holds it: the set of blocks sent (32 MiB per TiB), what is marked, and buffers."},
}

const emulatedStall = "The guest's two emulated processors stand still whenever the host runs something else: the longest single write to the bare disk took about half of 20 ms, or more, in the same runs (the raw numbers of outside/longest-write), and a stop " +
	"waits for several threads' turns, each of which may be that long. Idle, the medians of a stop's parts are a tenth of the 20 ms or less (rows drain, inside, resume), their 99th percentiles four times that and more. "

func why(figure, row string) string {
	for _, r := range reasons {
		if strings.HasPrefix(figure+"/"+row, r.prefix) {
			return r.why
		}
	}
	return "The reason is not known yet."
}
