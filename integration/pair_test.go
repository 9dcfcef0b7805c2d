package integration

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/uml"
	"blockferry/integration/vm"
)

// Two servers of one volume and a client of theirs, each a guest that systemd runs, set up by
// the commands of a page of the manual. The client writes numbered records, each made durable
// before the next, to a file on what it has mounted, while the volume is moved, and while the
// machine that writes it loses its power.

const (
	pairDisk = 512 << 20
	// pairGoesOn is how long a client on a busy machine may have to wait for the other server.
	pairGoesOn = 90 * time.Second
	// pairWatch is longer than from one renewal of a lease of 15 s to the next: who may follow is
	// on record then.
	pairWatch   = 7 * time.Second
	recordBytes = 4096
)

// pairRecords are those that the client writes.
var pairRecords = history{Seed: 83, Pause: 20 * time.Millisecond}

// haPair drives them, from the host.
type haPair struct {
	*walker
	a, b, client *farNode
}

// pairAddresses are the guests' in place of the page's, which are those of 10.0.1.0/24
// that end in 11, 12 and 13; 20 is the one that moves.
var pairAddresses = []string{
	"10.0.1.0/24", vm.MemberAddress(-1) + "/24", "10.0.1.11", vm.MemberAddress(0), "10.0.1.12", vm.MemberAddress(1),
	"10.0.1.13", vm.MemberAddress(2), "10.0.1.20", vm.MemberAddress(19), "ens5", "vec0",
}

// pairMembers are the three guests, with modules, and without blockferry. With pairTasks they are
// what inGuests takes.
func pairMembers(t *testing.T, modules ...string) []member {
	t.Helper()
	g := guest{Systemd: true, Bare: true, Memory: "700M", Modules: modules, Timeout: 10 * time.Minute}
	if !uml.Inside() {
		deb := packageFile(packagesOrSkip(t, "dpkg"), "deb", olderPackage)
		g.Files = logs(map[string]string{"/usr/local/sbin/apt-get": fmt.Sprintf(aptGetStandIn, uml.GuestPath(deb)), "/usr/local/sbin/scp": scpStandIn})
	}
	server := g
	server.Disks = []disk{{Size: pairDisk}}
	return []member{{"node-a", server}, {"node-b", server}, {"client", g}}
}

func pairTasks() tasks {
	all := nodeTasks()
	all["records"] = task(func(t *testing.T, path string) []span {
		file, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		held, err := pairRecords.recordsHeld(file)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		return held
	})
	return all
}

// newHAPair has the guests ready for a page's commands; here are the page's words and those that
// stand for them here, beside pairAddresses.
func newHAPair(g *guests, page string, here ...string) *haPair {
	g.t.Helper()
	p := &haPair{walker: newWalker(g, page, append(here, pairAddresses...)...)}
	node := func(name string) *farNode { return &farNode{guests: g, name: name, installed: true} }
	p.a, p.b, p.client = node("node-a"), node("node-b"), node("client")
	for _, n := range []*farNode{p.a, p.b} {
		n.ask(n.name, "installed", none{}, nil)
	}
	return p
}

// explain says of a failed test what the servers are like.
func (p *haPair) explain(units ...string) {
	for _, n := range []*farNode{p.a, p.b, p.client} {
		var d shDone
		line := "systemctl --no-pager --lines=0 status " + strings.Join(units, " ") + "; ip address show dev vec0; tail -5 /proc/mounts; dmesg | tail -20"
		if p.t.Failed() && p.members[n.name].Call(endLimit, "sh", line, &d) == nil {
			p.t.Logf("%s:\n%s", n.name, d.Out)
		}
	}
}

// writes has the client begin to write records, locked meanwhile if asked for.
func (p *haPair) writes(path string, lock bool) {
	p.t.Helper()
	p.client.ask(p.client.name, "write", writing{Path: path, History: pairRecords, From: 1, Records: true, Lock: lock}, nil)
	p.client.acked(20)
}

// records are those that a server holds in a file.
func (p *haPair) records(n *farNode, path string) (held []span) {
	p.t.Helper()
	n.ask(n.name, "records", path, &held)
	p.logf("%s holds the records %v", n.name, held)
	return held
}

// moved has a page's commands move the volume to b while the client writes, and checks that b
// has every record.
func (p *haPair) moved(until, path string) {
	p.t.Helper()
	p.a.await("up to date", farWait, upToDate)
	begun := time.Now()
	p.walk(until)
	p.logf("the commands took %v", time.Since(begun).Round(time.Millisecond))
	p.b.await("up", farWait, func(v status.Volume) bool { return v.Up })
	last := p.client.written().Acked
	p.goesOn(last + 1)
	p.logf("MEASURED the client has gone on %v after the first command", time.Since(begun).Round(10*time.Millisecond))
	p.goesOn(last + 20)
	acked := p.client.written().Acked
	if held := p.records(p.b, path); len(held) != 1 || held[0].From != 1 || held[0].To < acked {
		p.t.Errorf("after a planned switch %v are there of records 1 to %d", held, acked)
	}
}

// goesOn waits until the client's record was acknowledged.
func (p *haPair) goesOn(record uint64) {
	p.t.Helper()
	for begun := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		s := p.client.written()
		if s.Acked >= record {
			return
		}
		if s.Done || time.Since(begun) > pairGoesOn {
			p.t.Fatalf("the client does not go on: %+v", s)
		}
	}
}

// cut cuts the power of b, which writes the volume, while the client writes, and checks that the
// client goes on at a, and that a holds what status had claimed, and what was written since.
// It returns when the client has been stopped.
func (p *haPair) cut(path string) {
	p.t.Helper()
	p.b.await("up to date", farWait, upToDate)
	seen, claimed := p.b.watchWriter(p.client, pairWatch)
	p.members[p.b.name].Cut()
	at := time.Now()
	last := p.client.written().Acked
	p.goesOn(last + 1)
	p.logf("MEASURED the client goes on %v after the power cut", time.Since(at).Round(10*time.Millisecond))
	p.goesOn(last + 50)
	p.lost(p.a, seen, last, claimed, path)
	p.logf("%s says: %s", p.a.name, p.a.shell("grep -h 'took over by itself' "+uml.Dir+"/agent.log"))
}

// lost stops the client, and checks what a server holds that took over: what status had claimed before,
// and what was written since. Of the other one, which was lost, are the records up to seen, and some up to last.
func (p *haPair) lost(server *farNode, seen, last, claimed uint64, path string) {
	p.t.Helper()
	var w written
	p.client.ask(p.client.name, "stop", none{}, &w)
	server.await("up", farWait, func(v status.Volume) bool { return v.Up })
	held := p.records(server, path)
	// The first that the other server acknowledged is the one after the longest pause. One answer of
	// the old one may have been on its way when the client was asked.
	first, pause := w.longestPause(seen, last+2)
	p.logf("%d records; the client paused for %v before %d", w.Acked, pause.Round(10*time.Millisecond), first)
	if len(held) == 0 || held[0].From != 1 || held[0].To < claimed {
		p.t.Fatalf("up to %d had been claimed, %v are there", claimed, held)
	}
	k := held[0].To
	if end := held[len(held)-1]; len(held) > 2 || end.To != w.Acked || len(held) == 2 && end.From != first {
		p.t.Errorf("%v are there of records 1 to %d; %d is the first that %s acknowledged", held, w.Acked, first, server.name)
	}
	if k < first-1 {
		p.logf("MEASURED lost: records %d to %d, acknowledged in the %v before the last of them; up to %d had been claimed by status", k+1, first-1, (w.Ended[k-1] - w.Ended[first-2]).Round(time.Millisecond), claimed)
	} else {
		p.logf("MEASURED lost: nothing; up to %d had been claimed by status", claimed)
	}
}

// longestPause is the longest between two acknowledgements, of those after one record's and up to
// another's, and the record that ended it.
func (w *written) longestPause(after, upTo uint64) (record uint64, pause time.Duration) {
	for k := after + 1; k <= upTo; k++ { // Ended[k-1] is that of record k
		if p := w.Ended[k-2] - w.Ended[k-1]; p > pause {
			record, pause = k, p
		}
	}
	return record, pause
}

// startNumbered begins to write numbered records to a file, each made durable before the next; it
// has the file locked meanwhile if asked for.
func startNumbered(t *testing.T, path string, h history, lock bool) *writer {
	t.Helper()
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if lock {
		if err := unix.FcntlFlock(file.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
			t.Fatalf("%s can't be locked: %v", path, err)
		}
	}
	w := &writer{done: make(chan struct{}), first: 1}
	go func() {
		defer close(w.done)
		w.err = errors.Join(w.writeRecords(file, h), file.Close())
	}()
	t.Cleanup(func() {
		w.stopping.Store(true)
		select {
		case <-w.done:
		case <-time.After(10 * time.Second): // a mount whose server is gone waits for good
		}
	})
	return w
}

func (w *writer) writeRecords(file *os.File, h history) error {
	record := make([]byte, recordBytes)
	for k := uint64(1); !w.stopping.Load(); k++ {
		h.fillRecord(record, k)
		w.begun = append(w.begun, time.Now())
		w.issuedK.Store(k)
		if _, err := file.WriteAt(record, int64(k-1)*recordBytes); err != nil {
			return fmt.Errorf("record %d: %w", k, err)
		}
		if err := file.Sync(); err != nil {
			return fmt.Errorf("record %d: fsync: %w", k, err)
		}
		w.ended = append(w.ended, time.Now())
		w.ackedK.Store(k)
		time.Sleep(h.Pause)
	}
	return nil
}

// fillRecord makes the record k, which stands at its own place.
func (h history) fillRecord(into []byte, k uint64) {
	for at := 0; at < recordBytes; at += sector {
		h.fillSector(into[at:at+sector], k, (int64(k-1)*recordBytes+int64(at))/sector)
	}
}

// span is records from one to another, both included.
type span struct{ From, To uint64 }

// recordsHeld says which records a file holds; where there is none there are zeros. An error
// tells of one that is torn.
func (h history) recordsHeld(file io.ReaderAt) (held []span, err error) {
	record, scratch := alignedBuffer(recordBytes), make([]byte, sector)
	defer unix.Munmap(record)
	for k := uint64(1); ; k++ {
		n, err := file.ReadAt(record, int64(k-1)*recordBytes)
		if n == 0 && err == io.EOF {
			return held, nil
		}
		if n < recordBytes {
			return nil, fmt.Errorf("record %d: %d bytes: %w", k, n, err)
		}
		zeros := 0
		for at := 0; at < recordBytes; at += sector {
			from, err := h.sectorNumber(record[at:at+sector], (int64(k-1)*recordBytes+int64(at))/sector, scratch)
			if err != nil {
				return nil, fmt.Errorf("record %d: %w", k, err)
			}
			if from == 0 {
				zeros++
			} else if from != k {
				return nil, fmt.Errorf("record %d holds some of record %d", k, from)
			}
		}
		switch {
		case zeros == recordBytes/sector:
		case zeros > 0:
			return nil, fmt.Errorf("record %d is torn: %d of %d sectors are zeros", k, zeros, recordBytes/sector)
		case len(held) > 0 && held[len(held)-1].To == k-1:
			held[len(held)-1].To = k
		default:
			held = append(held, span{k, k})
		}
	}
}

// The judge of records sees those that are missing, and objects to what is torn.
func TestRecordsAreJudged(t *testing.T) {
	h := pairRecords
	image := make([]byte, 10*recordBytes)
	for _, k := range []uint64{1, 2, 3, 6, 7, 10} {
		h.fillRecord(image[(k-1)*recordBytes:][:recordBytes], k)
	}
	judge := func(damage func(image []byte) []byte) ([]span, error) {
		return h.recordsHeld(strings.NewReader(string(damage(append([]byte{}, image...)))))
	}
	held, err := judge(func(image []byte) []byte { return image })
	if err != nil || fmt.Sprint(held) != "[{1 3} {6 7} {10 10}]" {
		t.Errorf("%v, %v", held, err)
	}
	for what, damage := range map[string]func(image []byte) []byte{
		"half a record": func(image []byte) []byte { clear(image[2*recordBytes:][:sector]); return image },
		"another one's": func(image []byte) []byte { copy(image[3*recordBytes:], image[:recordBytes]); return image },
		"another number": func(image []byte) []byte {
			for at := recordBytes; at < 2*recordBytes; at += sector {
				h.fillSector(image[at:at+sector], 9, int64(at)/sector)
			}
			return image
		},
		"a bit":   func(image []byte) []byte { image[100] ^= 1; return image },
		"cut off": func(image []byte) []byte { return image[:9*recordBytes+sector] },
	} {
		if held, err := judge(damage); err == nil {
			t.Errorf("%s: %v", what, held)
		}
	}
}
