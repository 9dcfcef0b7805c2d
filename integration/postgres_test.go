package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/uml"
)

const (
	pgVolume = 128 << 20
	pgDisk   = 400 << 20
	// pgSettingsVar is where a guest finds deploy/postgres.
	pgSettingsVar = "BLOCKFERRY_POSTGRES"
)

// PostgreSQL under load loses its disk: brought back from the replica beside it onto a blank
// one, or by a node that takes over, it comes up by its own recovery, undamaged, with all
// transactions that were acknowledged before the cut, and none that began after it.
func TestPostgres(t *testing.T) {
	pgPrograms(t)
	settings, err := filepath.Abs("../deploy/postgres")
	if err != nil {
		t.Fatal(err)
	}
	disks := []disk{{Size: pgDisk}, {Size: pgDisk}, {Size: pgDisk}, {Size: pgDisk}}
	inGuest(t, guest{Memory: "1400M", Disks: disks, Env: []string{pgSettingsVar + "=" + uml.GuestPath(settings)}, Timeout: 10 * time.Minute}, func(t *testing.T) {
		p := newPg(t, mustMkdir(t, "/tmp/pg"))
		made := time.Now()
		whole := p.cluster(t)
		t.Logf("a cluster in %v", time.Since(made).Round(time.Millisecond))
		t.Run("restored", func(t *testing.T) { p.restored(t, whole) })
		t.Run("taken over", func(t *testing.T) { p.takenOver(t, whole) })
	})
}

func mustMkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.Mkdir(path, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	return path
}

// cluster makes one in memory, ready for pgbench, with our settings. Segments of WAL, and of
// what is written between checkpoints, are small, so that there are many of each.
func (p *pg) cluster(t *testing.T) (data string) {
	t.Helper()
	ours := mustRead(t, os.Getenv(pgSettingsVar)+"/blockferry.conf")
	initdb, found := "", false
	for line := range strings.Lines(mustRead(t, os.Getenv(pgSettingsVar)+"/createcluster.conf")) {
		if value, is := strings.CutPrefix(strings.TrimSpace(line), "initdb_options = "); is {
			initdb, found = strings.Trim(value, "'"), true
		}
	}
	if !found {
		t.Fatal("no initdb_options")
	}
	data = p.dir + "/whole"
	p.must(t, "initdb", append(strings.Fields(initdb), "--no-sync", "--wal-segsize=1", "--locale=C", "--encoding=UTF8", "--auth=trust", "-D", data)...)
	conf, err := os.OpenFile(data+"/postgresql.conf", os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = fmt.Fprintf(conf, "%s\nmax_connections = 20\nshared_buffers = 16MB\nmax_wal_size = 4MB\nmin_wal_size = 2MB\n", ours)
	}
	if err != nil {
		t.Fatal(err)
	}
	conf.Close()
	p.start(t, data)
	p.prepare(t)
	p.stop(t, data)
	return data
}

// begin has the server run on a volume's file system, from a copy of the cluster.
func (p *pg) begin(t *testing.T, device, whole string) (dir, data string) {
	t.Helper()
	mkfs(t, "ext4", device)
	dir = mustMount(t, "ext4", device, "")
	data = dir + "/data"
	run(t, "cp", "-a", whole, data)
	run(t, "sync", "--file-system", dir) // as initdb does
	_ = os.Remove(p.log())               // of before
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := os.ReadFile(p.log())
			t.Logf("the server's log:\n%s", text)
		}
		p.kill(t, data)
	})
	p.start(t, data)
	return dir, data
}

// back has it run again on what came back.
func (p *pg) back(t *testing.T, device string) (data string) {
	t.Helper()
	data = mustMount(t, "ext4", device, "") + "/data"
	_ = os.Remove(p.log())
	p.start(t, data)
	return data
}

// underLoad has the server work, and a file be written beside it, until a replica holds a cut of that
// time, and has them go on.
func (p *pg) underLoad(t *testing.T, c *cli, dir string) (load *bench, records func() (told, error)) {
	t.Helper()
	load, records = p.load(t, "-T", "3600"), startRecords(dir+"/records")
	load.await(t, 300)
	epoch := func(v status.Volume) uint64 {
		if p := v.Replicas[0].Position; p != nil {
			return p.Epoch
		}
		return 0
	}
	before := epoch(c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up }))
	c.await(t, "going on", 2*time.Minute, func(v status.Volume) bool { return epoch(v) >= before+2 })
	return load, records
}

func (p *pg) restored(t *testing.T, whole string) {
	table := fmt.Sprintf("0 %d linear %s 0", sectors(t, ubd(0)), ubd(0))
	ssd := dmCreate(t, "ssd", table)
	c := newCLI(t, strings.Replace(oneReplica(ssd, ubd(1)), "    interval:", fmt.Sprintf("    size: %d\n    interval:", pgVolume), 1))
	c.must(t, "create")
	c.start(t)
	v := c.await(t, "up to date", 3*time.Minute, upToDate)
	dir, data := p.begin(t, v.Path, whole)
	c.must(t, "sync", "--timeout", "60s")
	load, records := p.underLoad(t, c, dir)
	dmSwap(t, "ssd", fmt.Sprintf("0 %d error", sectors(t, ubd(0))))
	said := load.result(t)
	p.kill(t, data)
	noted, _ := records() // its disk failed
	mustUnmount(t, dir)
	c.must(t, "down", "--force")
	zeroDisk(t, ubd(0))
	dmSwap(t, "ssd", table)
	cut := cutSaid(t, c.must(t, "restore"))
	c.await(t, "up to date again", 3*time.Minute, upToDate)
	data = p.back(t, v.Path)
	noted.judge(t, "records, restored", map[int]int{0: recordsIn(t, filepath.Dir(data)+"/records")}, cut)
	p.judge(t, "restored", said, cut)
	p.whole(t, "restored", data)
	mustUnmount(t, filepath.Dir(data))
	c.must(t, "down")
	c.kill(t)
}

func (p *pg) takenOver(t *testing.T, whole string) {
	folders := issue(t, blockferry(t), "node-a", "node-b")
	node := func(me, other, role, here, there, device string) *cli {
		return newCLI(t, twinFile("", me, folders[me], here, t.TempDir(), role, device, pgVolume, "stall-limit: 20s\n    journal: 64MiB", other, there))
	}
	a := node("node-a", "node-b", "primary", "127.0.0.1", "127.0.0.2", ubd(2))
	b := node("node-b", "node-a", "secondary", "127.0.0.2", "127.0.0.1", ubd(3))
	b.must(t, "create")
	b.start(t)
	a.must(t, "create")
	a.start(t)
	v := a.await(t, "up to date", 2*time.Minute, upToDate)
	dir, data := p.begin(t, v.Path, whole)
	a.must(t, "sync", "--timeout", "60s")
	load, records := p.underLoad(t, a, dir)
	// The agent goes first: what the server writes from then on nobody else has.
	a.kill(t)
	time.Sleep(500 * time.Millisecond)
	p.kill(t, data)
	said := load.result(t)
	noted, err := records()
	if err != nil {
		t.Error(err)
	}
	mustUnmount(t, dir)
	removeStack(t, "data")
	at := b.await(t, "not fed any more", time.Minute, func(v status.Volume) bool { return v.FedBy == "" && v.CutAt != nil })
	b.must(t, "primary", "--force")
	v = b.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
	data = p.back(t, v.Path)
	noted.judge(t, "records, taken over", map[int]int{0: recordsIn(t, filepath.Dir(data)+"/records")}, at.CutAt.Truncate(time.Millisecond))
	p.judge(t, "taken over", said, at.CutAt.Truncate(time.Millisecond))
	p.whole(t, "taken over", data)
	mustUnmount(t, filepath.Dir(data))
	b.must(t, "down", "--force")
	b.kill(t)
}
