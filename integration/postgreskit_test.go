package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// PostgreSQL from Debian's packages, under pgbench.

// pgPrograms is the folder of the newest server's programs; the test is skipped where there is none.
func pgPrograms(t *testing.T) string {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if len(found) == 0 {
		if os.Getenv(requireVar) == "" {
			t.Skip("no PostgreSQL: make deps")
		}
		t.Fatal("no PostgreSQL: make deps")
	}
	slices.SortFunc(found, func(a, b string) int { return len(a) - len(b) + strings.Compare(a, b) })
	return filepath.Dir(found[len(found)-1])
}

// pgbenchScript is what pgbench does by itself, and beside it each client counts what it did:
// whoever knows how many transactions it was told of knows which rows have to be there.
const pgbenchScript = `\set n :n + 1
\set aid random(1, 100000)
\set tid random(1, 10)
\set delta random(-5000, 5000)
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = 1;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (:tid, 1, :aid, :delta, CURRENT_TIMESTAMP);
INSERT INTO told (client, n, begun) VALUES (:client_id, :n, now());
END;
`

const pgbenchClients = 3

// pg is a server, by its programs, its socket's folder and its user. The folder, which is not on the
// volume, also has what pgbench notes.
type pg struct {
	bin, dir string
	who      *syscall.Credential
}

func newPg(t *testing.T, socket string) *pg {
	t.Helper()
	u, err := user.Lookup("postgres")
	if err != nil {
		t.Fatal(err)
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return &pg{pgPrograms(t), socket, &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
}

// command is one of its programs, run as its user.
func (p *pg) command(t *testing.T, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), filepath.Join(p.bin, name), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.who}
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "PGHOST=" + p.dir, "PGDATABASE=postgres", "PGUSER=postgres"}
	cmd.Dir = "/"
	return cmd
}

// must runs one that has to end well. What it says goes to a file, as a server that it
// starts keeps that open.
func (p *pg) must(t *testing.T, name string, args ...string) string {
	t.Helper()
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := p.command(t, name, args...)
	cmd.Stdout, cmd.Stderr = file, file
	err = cmd.Run()
	out := mustRead(t, file.Name())
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

func (p *pg) start(t *testing.T, data string) {
	t.Helper()
	p.must(t, "pg_ctl", "start", "-w", "-t", "120", "-s", "-D", data, "-l", p.log(), "-o", "-k "+p.dir+" -c listen_addresses=''")
}

func (p *pg) stop(t *testing.T, data string) {
	t.Helper()
	p.must(t, "pg_ctl", "stop", "-w", "-t", "120", "-s", "-m", "fast", "-D", data)
}

func (p *pg) log() string { return p.dir + "/server.log" }

// prepare makes pgbench's tables, and that in which its clients count.
func (p *pg) prepare(t *testing.T) {
	t.Helper()
	p.must(t, "pgbench", "-i", "-q", "-I", "dtGvp", "postgres")
	p.must(t, "psql", "-qc", "CREATE TABLE told (client int, n int, begun timestamptz, PRIMARY KEY (client, n))")
}

// bench is a pgbench that runs.
type bench struct {
	pg    *pg
	dir   string
	ended chan error
	out   *os.File
}

// load starts pgbench, for a time, or until its server is gone.
func (p *pg) load(t *testing.T, how ...string) *bench {
	t.Helper()
	dir := t.TempDir()
	out, err := os.Create(dir + "/out")
	if err == nil {
		err = errors.Join(os.WriteFile(dir+"/script", []byte(pgbenchScript), 0o644), chownAll(dir, p.who))
	}
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{p, dir, make(chan error, 1), out}
	cmd := p.command(t, "pgbench", slices.Concat([]string{"-n", "-M", "prepared", "-c", fmt.Sprint(pgbenchClients), "-P", "1", "-D", "n=0", "-f", dir + "/script", "-l", "--log-prefix=" + dir + "/log"}, how, []string{"postgres"})...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { b.ended <- cmd.Wait() }()
	return b
}

// chownAll gives what is in a folder, and the folders above it that are only root's, to a user.
func chownAll(dir string, who *syscall.Credential) error {
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	return filepath.Walk(dir, func(path string, _ os.FileInfo, err error) error {
		return errors.Join(err, os.Lchown(path, int(who.Uid), int(who.Gid)))
	})
}

var pgbenchProgress = regexp.MustCompile(`(?m)^progress: .* s, ([0-9.]+) tps,`)

// await waits until it has done some transactions, by what it says of itself each second.
func (b *bench) await(t *testing.T, transactions float64) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		done, said := 0.0, mustRead(t, b.out.Name())
		for _, match := range pgbenchProgress.FindAllStringSubmatch(said, -1) {
			n, err := strconv.ParseFloat(match[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			done += n
		}
		if done >= transactions {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("pgbench does not get on:\n%s", said)
		}
	}
}

// result waits for its end, and is what its clients were told.
func (b *bench) result(t *testing.T) told {
	t.Helper()
	select {
	case err := <-b.ended:
		t.Logf("pgbench ended: %v\n%s", err, mustRead(t, b.out.Name()))
	case <-time.After(3 * time.Minute):
		t.Fatalf("pgbench does not end:\n%s", mustRead(t, b.out.Name()))
	}
	logs, err := filepath.Glob(b.dir + "/log.*")
	if err != nil || len(logs) != 1 {
		t.Fatalf("pgbench's log: %q, %v", logs, err)
	}
	clients := told{}
	for line := range strings.Lines(mustRead(t, logs[0])) {
		// The client, its transaction, microseconds that it took, script, seconds and microseconds at its end.
		var client, script int
		var number, took, seconds, micros int64
		if _, err := fmt.Sscan(line, &client, &number, &took, &script, &seconds, &micros); err != nil {
			t.Fatalf("pgbench's log: %q: %v", line, err)
		}
		end := time.Unix(seconds, micros*1000)
		clients[client] = append(clients[client], step{end.Add(-time.Duration(took) * time.Microsecond), end})
	}
	return clients
}

// judge looks at a server that came up from a copy: sums are equal, and what was told before the
// cut is there. whole looks at all else, and leaves the server stopped.
func (p *pg) judge(t *testing.T, what string, c told, cut time.Time) {
	t.Helper()
	held := map[int]int{}
	behind := time.Hour
	for line := range strings.Lines(p.must(t, "psql", "-AtF ", "-c", "SELECT client, n, (extract(epoch FROM begun) * 1000000)::bigint FROM told ORDER BY client, n")) {
		var client, n int
		var micros int64
		if _, err := fmt.Sscan(line, &client, &n, &micros); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if held[client]++; held[client] != n {
			t.Fatalf("%s: client %d's transaction %d is there, and before it there are %d", what, client, n, held[client]-1)
		}
		begun := time.UnixMicro(micros) // by the server
		if n <= len(c[client]) {
			c[client][n-1].Begun = begun
		}
		if n >= 2 && n <= len(c[client])+1 {
			behind = min(behind, begun.Sub(c[client][n-2].Told))
		}
	}
	// pgbench looks at two clocks when it begins, one after the other, and notes times that are too
	// early by what lies between. Of a transaction it was told before it began the next, so it can't be more.
	t.Logf("pgbench's clock is at most %v behind", behind)
	for _, list := range c {
		for i := range list {
			list[i].Told = list[i].Told.Add(behind)
		}
	}
	c.judge(t, what, held, cut)
	sums := strings.Fields(p.must(t, "psql", "-AtF ", "-c", "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), (SELECT sum(bbalance) FROM pgbench_branches), "+
		"(SELECT sum(delta) FROM pgbench_history), (SELECT count(*) FROM pgbench_history), (SELECT count(*) FROM told)"))
	if len(sums) != 6 || sums[0] != sums[1] || sums[0] != sums[2] || sums[0] != sums[3] || sums[4] != sums[5] {
		t.Errorf("%s: sums of accounts, tellers, branches and history, and numbers of transactions: %q", what, sums)
	}
}

// whole checks that it came up by its own recovery, and that no page and no index is damaged.
func (p *pg) whole(t *testing.T, what, data string) {
	t.Helper()
	if log := mustRead(t, p.log()); !strings.Contains(log, "automatic recovery in progress") || strings.Contains(log, "invalid page") {
		t.Errorf("%s: the server's log:\n%s", what, log)
	}
	p.must(t, "pg_amcheck", "--all", "--install-missing", "--heapallindexed", "--parent-check")
	p.stop(t, data)
	p.must(t, "pg_checksums", "--check", "-D", data)
}

// kill ends all processes of the server's user, as a machine without power has none.
func (p *pg) kill(t *testing.T, data string) {
	t.Helper()
	text, err := os.ReadFile(data + "/postmaster.pid")
	if err == nil {
		var pid int
		if _, err := fmt.Sscan(string(text), &pid); err != nil {
			t.Fatal(err)
		}
		_ = syscall.Kill(pid, syscall.SIGKILL) // its children see that, and end
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for ; p.runs(t); time.Sleep(20 * time.Millisecond) {
		if ctx.Err() != nil {
			out, _ := tryRun(t, "ps", "aux")
			t.Fatalf("the server does not end:\n%s", out)
		}
	}
}

// runs says whether any of its processes is left.
func (p *pg) runs(t *testing.T) bool {
	t.Helper()
	for _, file := range glob(t, "/proc/[0-9]*/comm") {
		text, err := os.ReadFile(file)
		if err == nil && strings.TrimSpace(string(text)) == "postgres" {
			return true
		}
	}
	return false
}
