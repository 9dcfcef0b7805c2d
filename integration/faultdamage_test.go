package integration

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
)

// damage is one way in which what blockferry wrote for itself goes bad while
// no agent looks.
type damage struct {
	name string
	// pending: the replica has acknowledged an epoch that it could not apply.
	// down: the stack is down, not just without an agent.
	pending, down bool
	do            func()
	says          []string // of status; nil: replication goes on by itself
	wayOut        func()   // what the advice says
	plan          string   // how the replica gets there: incremental, compare or full
}

// damaged is the volume that all of it is done to.
type damaged struct {
	t         *testing.T
	c         *cli
	ssd, disk string // the volume's disk and the replica's
}

func (d *damaged) zero(device string, from, to int64) {
	d.t.Helper()
	for ; from < to; from += 4096 {
		editBlock(d.t, device, from, func(b []byte) { clear(b) })
	}
}

// superblock is the newest of the replica's, by the drawing of the format.
type superblock struct {
	at, other               int64 // places of the newest and of the other copy
	sequence                uint64
	mapAt, journalAt, bytes int64
	tail, head              int64 // places on the disk
}

func (d *damaged) superblock() (s superblock) {
	d.t.Helper()
	end := sectors(d.t, d.disk) * sector &^ (1<<20 - 1)
	le := binary.LittleEndian
	for _, at := range []int64{end - 1<<20, end - 512<<10} {
		editBlock(d.t, d.disk, at, func(b []byte) {
			if string(b[:8]) != "BFSUPER1" || le.Uint64(b[16:]) < s.sequence {
				s.other = at
				return
			}
			s = superblock{at: at, other: s.at, sequence: le.Uint64(b[16:]), mapAt: int64(le.Uint64(b[96:])),
				journalAt: int64(le.Uint64(b[112:])), bytes: int64(le.Uint64(b[120:]))}
			s.tail = s.journalAt + int64(le.Uint64(b[232:])%uint64(s.bytes))
			s.head = s.journalAt + int64(le.Uint64(b[256:])%uint64(s.bytes))
		})
	}
	return s
}

// label is the volume's, with the place of the newest slot.
func (d *damaged) label() (l *volume.Label, newest int64) {
	d.t.Helper()
	disk, err := blockdev.OpenFile(d.ssd, blockdev.OpenOptions{})
	if err != nil {
		d.t.Fatal(err)
	}
	defer disk.Close()
	if l, err = volume.ReadLabel(disk); err != nil {
		d.t.Fatal(err)
	}
	return l, int64(l.Sequence%2) * 512 << 10
}

// eraBlock is the place on the disk of the block of era metadata that a field of
// its superblock names; 0 names the superblock itself.
func (d *damaged) eraBlock(field int) int64 {
	d.t.Helper()
	l, _ := d.label()
	at := l.Areas.Meta.Offset + 4096
	block := uint64(0)
	if field > 0 {
		editBlock(d.t, d.ssd, at, func(b []byte) { block = binary.LittleEndian.Uint64(b[field:]) })
		if block == 0 {
			d.t.Fatalf("the era metadata names no block in field %d", field)
		}
	}
	return at + int64(block)*4096
}

const (
	eraWritesetTree = 200
	eraArray        = 208
)

// eraLeaf is the place on the disk of the second leaf of the era array, which has
// one root and one leaf of each 1018 blocks.
func (d *damaged) eraLeaf() (at int64) {
	d.t.Helper()
	editBlock(d.t, d.ssd, d.eraBlock(eraArray), func(b []byte) {
		le := binary.LittleEndian
		if le.Uint32(b[16:]) != 2 {
			d.t.Fatalf("the era array has %d leaves, want 2", le.Uint32(b[16:]))
		}
		at = d.eraBlock(0) + int64(le.Uint64(b[32+8*le.Uint32(b[20:])+8:]))*4096
	})
	return at
}

// Promise 1 and 2: what is damaged while no agent looks is noticed, named, and
// never taken for clean: the replica is compared or copied, or refused with the
// way out; after that it holds what the volume holds.
func TestFaultDamage(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 208 << 20}, {Size: 144 << 20}}, Modules: []string{"dm-delay"}, Timeout: 8 * time.Minute}, func(t *testing.T) {
		const size, filled, span = 68 << 20, 24 << 20, 8 << 20
		total := sectors(t, ubd(1))
		d := &damaged{t: t, ssd: ubd(0), disk: ubd(1)}
		sane := fmt.Sprintf("0 %d linear %s 0", total, ubd(1))
		dmCreate(t, "bad", fmt.Sprintf("0 %d error", total))
		late := dmCreate(t, "late", sane)
		c := newCLI(t, faultConfig(d.ssd, late, size, "    cow: 24MiB\n", "        journal: 32MiB\n"))
		d.c = c
		ctl := mapper(t)
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		noise(t, v.Path, span, filled-span, 1)
		c.must(t, "sync", "--timeout", "60s")
		h := history{Seed: 51, Size: span, MaxBytes: 64 << 10}
		last := uint64(0)
		write := func() {
			w := startWriter(t, v.Path, h, last+1)
			w.awaitWrites(t, 50)
			last = w.stop(t)
		}
		format := func() {
			c.refused(t, 3, []string{"is not zero", "nothing was written", "--force"}, "create", "--replica", "ebs")
			c.must(t, "create", "--replica", "ebs", "--force")
		}
		drop := func() { c.must(t, "recover", "--drop-journal", late) }
		held := uint64(0) // the last write that the replica holds when the agent ends
		place := func(n int64) string { return fmt.Sprint(n) }
		named := "" // the place of the damage, as it has to be named
		replica := func(at int64) { named = place(at); flipBit(d.t, d.disk, at+40) }
		flipEra := func(at int64) string {
			flipBit(d.t, d.ssd, at+100)
			return fmt.Sprintf("era metadata block %d", (at-d.eraBlock(0))/4096)
		}
		era := func(field int) func() {
			return func() {
				named = fmt.Sprintf("from byte %d, is damaged: ", d.eraBlock(0))
				named += flipEra(d.eraBlock(field))
			}
		}
		journal := []string{late, "journal damaged at", "the older image", "still whole", "recover --drop-journal"}
		for _, f := range []damage{
			{name: "superblock, the newest copy flipped", do: func() { replica(d.superblock().at) }, plan: "incremental"},
			{name: "superblock, both copies flipped", do: func() { s := d.superblock(); replica(s.other); replica(s.at) },
				says: []string{late, "no valid superblock", "create --replica ebs data"}, wayOut: format, plan: "full"},
			{name: "change map, a page flipped", do: func() { replica(d.superblock().mapAt) }, plan: "incremental"},
			{name: "journal, a header flipped", pending: true, do: func() { replica(d.superblock().tail) }, says: journal, wayOut: drop, plan: "incremental"},
			{name: "journal, a body flipped", pending: true, do: func() { at := d.superblock().tail; named = place(at); flipBit(d.t, d.disk, at+4096+77) },
				says: journal, wayOut: drop, plan: "incremental"},
			{name: "journal, truncated", pending: true, do: func() { s := d.superblock(); named = place(s.tail); d.zero(d.disk, s.tail+8192, s.head) },
				says: journal, wayOut: drop, plan: "incremental"},
			// Under the stack. The kernel has read all of this and looks at the disk no more. The
			// superblock it writes again with each commit. The array's root, and the leaf
			// of what was written, it copies to another place, from memory, as it digests the
			// era that the next cut ends: nothing refers to what was damaged when the marks are read,
			// all that is read has its checksum, and should the kernel read the damage itself,
			// its digest fails and the array stays as it was.
			{name: "era metadata, superblock flipped under the stack", do: func() { era(0)(); named = "" }, plan: "incremental"},
			{name: "era metadata, array flipped under the stack", do: func() { flipEra(d.eraBlock(eraArray)); named = "" }, plan: "incremental"},
			// A leaf of what was not written stays where it is, and so does the damage.
			{name: "era metadata, leaf flipped under the stack", do: func() { named = flipEra(d.eraLeaf()) }, plan: "compare"},
			{name: "era metadata, superblock flipped", down: true, do: era(0), plan: "compare"},
			{name: "era metadata, array flipped", down: true, do: era(eraArray), plan: "compare"},
			{name: "era metadata, writesets flipped", down: true, do: era(eraWritesetTree), plan: "compare"},
			{name: "era metadata, truncated", down: true, do: func() {
				at := d.eraBlock(0)
				named = fmt.Sprintf("from byte %d, is damaged", at)
				d.zero(d.ssd, at+4096, at+400*4096)
			}, plan: "compare"},
			{name: "label, the newest slot flipped", down: true, do: func() {
				_, at := d.label()
				named = fmt.Sprintf("%s: slot %d: the volume label is damaged", d.ssd, at/(512<<10))
				flipBit(d.t, d.ssd, at+200)
			}, plan: "incremental"},
			{name: "label, both slots flipped", down: true, do: func() {
				named = d.ssd + ": slot"
				flipBit(d.t, d.ssd, 200)
				flipBit(d.t, d.ssd, 512<<10+200)
			}, says: []string{d.ssd, "the volume label is damaged", "restore --force data"}, wayOut: func() {
				c.must(t, "restore", "--force") // what the replica lacks is lost with the label
				judgeDevice(t, v.Path, h, held, held)
				last = held
			}, plan: "incremental"},
		} {
			began := time.Now()
			if f.pending {
				// The change map can't be written, so no apply can begin.
				m := d.superblock().mapAt / sector
				dmSwap(t, "late", fmt.Sprintf("0 %d linear %s 0\n%d 2048 delay %s %d 0 /dev/mapper/bad 0 0 %s %d 0\n%d %d linear %s %d",
					m, ubd(1), m, ubd(1), m, ubd(1), m, m+2048, total-m-2048, ubd(1), m+2048))
				from := len(c.logText(t))
				write()
				c.awaitLog(t, from, "replica not served", 30*time.Second)
			} else {
				write()
				c.must(t, "sync", "--timeout", "60s")
			}
			c.kill(t)
			held = last
			if f.pending {
				dmSwap(t, "late", sane)
			} else {
				write() // marked, and nowhere else
			}
			if f.down {
				if err := volume.Down(ctl, "data"); err != nil {
					t.Fatal(err)
				}
			}
			f.do()
			from := len(c.logText(t))
			c.start(t)
			if f.says != nil {
				c.says(t, 30*time.Second, f.says...)
				f.wayOut()
			}
			c.await(t, "up to date after "+f.name, time.Minute, upToDate)
			c.must(t, "sync", "--timeout", "60s")
			c.must(t, "verify")
			log := c.logText(t)[from:]
			full, compared := plans(log, "full"), plans(log, "compare")
			t.Logf("MEASURED %s: %d full copies, %d comparisons, %d incremental epochs, %.1f s", f.name, full, compared, plans(log, "incremental"), time.Since(began).Seconds())
			if full > 0 != (f.plan == "full") || compared > 0 != (f.plan == "compare") {
				t.Errorf("%s: %d full copies, %d comparisons, want %s", f.name, full, compared, f.plan)
			}
			if !strings.Contains(log, named) {
				t.Errorf("%s: the agent does not name '%s':\n%s", f.name, named, log)
			}
		}
		began := time.Now()
		// What rots in the data itself is found, and left alone without the operator's word. Then
		// it is as it was, repaired by an ordinary epoch while the volume is written to.
		rotten := []int64{12<<20 + 5, 13<<20 + 77, 40 << 20} // two in the noise, one in what nobody wrote
		right, names := map[int64][]byte{}, []string{}
		for _, at := range rotten {
			block := at &^ 4095
			editBlock(t, d.disk, block, func(b []byte) { right[block] = append([]byte(nil), b...) })
			flipBit(t, d.disk, at)
			names = append(names, fmt.Sprintf("%d+4096", block))
		}
		from := len(c.logText(t))
		c.refused(t, 4, append(names, "differs in 12KiB"), "verify")
		c.refused(t, 4, append(names, "differs in 12KiB"), "verify")
		w := startWriter(t, v.Path, h, last+1)
		w.awaitWrites(t, 20)
		out := c.must(t, "verify", "--repair")
		for _, words := range append(names, "differs in 12KiB", "gets the volume's content there", "differed in 12KiB", "brought 12KiB of it, and compared once more it holds the same") {
			if !strings.Contains(out, words) {
				t.Errorf("verify --repair does not say '%s':\n%s", words, out)
			}
		}
		last = w.stop(t)
		c.must(t, "sync", "--timeout", "60s")
		if out := c.must(t, "verify", "--repair"); strings.Contains(out, "differ") {
			t.Errorf("a repair of what needs none: %s", out)
		}
		log := c.logText(t)[from:]
		incremental(t, "repaired", log)
		t.Logf("MEASURED repaired in %.1f s, %d KiB sent", time.Since(began).Seconds(), epochBytes(t, log, "WireBytes")>>10)
		c.must(t, "down")
		c.kill(t)
		c.must(t, "recover", late)
		judgeDevice(t, late, h, last, last)
		for at, want := range right {
			editBlock(t, d.disk, at, func(b []byte) {
				if !bytes.Equal(b, want) {
					t.Errorf("the block at %d is not what it was before it rotted", at)
				}
			})
		}
	})
}
