package transport

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"blockferry/cmd/blockferry/certs"
	"blockferry/proto"
)

// logged is a log that can be read.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// await waits until something was logged.
func (l *logged) await(t *testing.T, want string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if strings.Contains(l.String(), want) {
			return
		}
	}
	t.Errorf("never logged: %q; but:\n%s", want, l.String())
}

// echo answers each Hello with who called, as a refusal.
type echo struct {
	proto.UnimplementedReplicationServer
}

func (e *echo) Replicate(s proto.Replication_ReplicateServer) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	return s.Send(&proto.FromReplica{Message: &proto.FromReplica_Refused{Refused: &proto.Refused{Message: Who(s.Context())}}})
}

type rig struct {
	address string
	log     *logged
	server  *Server
}

func serve(t *testing.T, identity func(*slog.Logger) *Identity) *rig {
	t.Helper()
	r := &rig{log: &logged{}}
	log := slog.New(slog.NewTextHandler(r.log, nil))
	r.server = NewServer(ServerOptions{Identity: identity(log), Log: log, Service: &echo{}, Known: func(n string) bool { return n == "node-a" }})
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.address = l.Addr().String()
	done := make(chan error, 1)
	go func() { done <- r.server.Serve(l) }()
	t.Cleanup(func() {
		r.server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r
}

func discard() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func authority(t *testing.T) *certs.Authority {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	if _, err := certs.Init(dir, "test", time.Now(), 100); err != nil {
		t.Fatal(err)
	}
	a, err := certs.OpenAuthority(dir, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// folder is a node's, issued some days ago for 30 days.
func folder(t *testing.T, a *certs.Authority, name string, daysAgo int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	if _, err := a.Issue(dir, name, time.Now().AddDate(0, 0, -daysAgo), 30); err != nil {
		t.Fatal(err)
	}
	return dir
}

// trusting makes a folder trust what another one trusts.
func trusting(t *testing.T, dir, as string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(as, certs.CACertFile))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, certs.CACertFile), content, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func ask(t *testing.T, c *Client) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stream, err := c.Replicate(ctx)
	if err != nil {
		return "", err
	}
	_ = stream.Send(&proto.FromPrimary{Message: &proto.FromPrimary_Hello{Hello: &proto.Hello{}}})
	m, err := stream.Recv()
	if err != nil {
		return "", err
	}
	return m.GetRefused().GetMessage(), nil
}

// unchecked is an identity that shows even what is not good.
func unchecked(t *testing.T, dir string) *tls.Config {
	t.Helper()
	n, err := certs.ReadNode(dir)
	if err != nil {
		t.Fatal(err)
	}
	c := tlsConfig(n)
	c.InsecureSkipVerify = true // the server is what is tested
	return c
}

func TestPeersKnowEachOther(t *testing.T) {
	a := authority(t)
	dir := folder(t, a, "node-b", 0)
	r := serve(t, func(l *slog.Logger) *Identity { return NewIdentity("node-b", dir, l) })
	got, err := ask(t, NewIdentity("node-a", folder(t, a, "node-a", 0), discard()).Client("node-b", r.address))
	if err != nil || got != "node-a@127.0.0.1" {
		t.Errorf("%q, %v", got, err)
	}
	if r.log.String() != "" {
		t.Errorf("logged: %s", r.log)
	}
	// Its connection ended with the call.
	awaitNone(t, &r.server.limits)
}

func awaitNone(t *testing.T, l *limits) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		l.mu.Lock()
		none := l.pending == 0 && len(l.hosts) == 0 && len(l.nodes) == 0
		l.mu.Unlock()
		if none {
			return
		}
	}
	t.Errorf("connections are still counted: %d pending, %v, %v", l.pending, l.hosts, l.nodes)
}

// What the client finds wrong with the server, and with itself, in words.
func TestClientRefuses(t *testing.T) {
	a, other := authority(t), authority(t)
	mine := folder(t, a, "node-a", 0)
	for _, c := range []struct {
		what, server, client, want string
		fault                      Fault
	}{
		{"another node", folder(t, a, "node-c", 0), mine, "its certificate, of node 'node-c', is not of node 'node-b'", TheirCertificate},
		{"another authority", folder(t, other, "node-b", 0), mine, "its certificate, of node 'node-b', is not by an authority that is trusted here", TheirCertificate},
		{"an expired one of our own", folder(t, a, "node-b", 0), folder(t, a, "node-a", 40), "this node's certificate can't be used: ", OwnCertificate},
		{"none of our own", folder(t, a, "node-b", 0), t.TempDir(), "this node's certificate can't be read: ", OwnCertificate},
		{"one of our own of another node", folder(t, a, "node-b", 0), folder(t, a, "node-d", 0), "is of node 'node-d', this node is 'node-a'", OwnCertificate},
	} {
		name := "node-b"
		if c.what == "another node" {
			name = "node-c"
		}
		r := serve(t, func(l *slog.Logger) *Identity { return NewIdentity(name, c.server, l) })
		_, err := ask(t, NewIdentity("node-a", c.client, discard()).Client("node-b", r.address))
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "node 'node-b' at "+r.address+": "+c.want) && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.what, err, c.want)
		}
		if got := FaultOf(fmt.Errorf("replica: %w", err)); got != c.fault {
			t.Errorf("%s: fault %d, want %d", c.what, got, c.fault)
		}
	}
	// Nobody there at all.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	_, err = ask(t, NewIdentity("node-a", mine, discard()).Client("node-b", l.Addr().String()))
	if err == nil || FaultOf(err) != Unreachable || !strings.Contains(err.Error(), "can't be reached: ") || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("nobody there: %v", err)
	}
}

// What the server refuses: the caller is told in words, the log has it once,
// and nobody gets as far as the service.
func TestServerRefuses(t *testing.T) {
	a, other := authority(t), authority(t)
	dir := folder(t, a, "node-b", 0)
	r := serve(t, func(l *slog.Logger) *Identity { return NewIdentity("node-b", dir, l) })
	shows := func(config *tls.Config) error {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		conn, err := grpc.NewClient(r.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		stream, err := proto.NewReplicationClient(conn).Replicate(ctx)
		if err == nil {
			_ = stream.Send(&proto.FromPrimary{})
			_, err = stream.Recv()
		}
		return err
	}
	old := unchecked(t, folder(t, a, "node-a", 0))
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	none := unchecked(t, folder(t, a, "node-a", 0))
	none.Certificates = nil
	for _, c := range []struct {
		what     string
		config   *tls.Config
		told, on string
	}{
		{"expired", unchecked(t, folder(t, a, "node-a", 40)), "expired certificate", "its certificate, of node 'node-a', expired on "},
		{"foreign", unchecked(t, folder(t, other, "node-a", 0)), "unknown certificate authority", "its certificate, of node 'node-a', is not by an authority that is trusted here"},
		{"TLS 1.2", old, "protocol version", "it speaks no TLS 1.3"},
		{"no certificate", none, "certificate required", "it shows no certificate"},
		{"not known here", unchecked(t, folder(t, a, "node-c", 0)), "node 'node-c' is not among the 'peers' of any volume here", "node 'node-c' is not among the 'peers'"},
	} {
		for range 3 {
			if err := shows(c.config); err == nil || !strings.Contains(err.Error(), c.told) {
				t.Errorf("%s: told %v, want %q", c.what, err, c.told)
			}
		}
		r.log.await(t, c.on)
		if n := strings.Count(r.log.String(), c.on); n != 1 {
			t.Errorf("%s was logged %d times:\n%s", c.what, n, r.log)
		}
	}
	// In words where this program is the one that is refused.
	_, err := ask(t, NewIdentity("node-a", trusting(t, folder(t, other, "node-a", 0), dir), discard()).Client("node-b", r.address))
	if err == nil { // it does not even show it
		t.Error("a certificate of another authority was accepted")
	}
	conn, err := net.Dial("tcp", r.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, conn); n > 100 || err != nil && !strings.Contains(err.Error(), "reset") {
		t.Errorf("plaintext got %d bytes back (%v)", n, err)
	}
	r.log.await(t, "it does not speak TLS")
	awaitNone(t, &r.server.limits)
}

// What the peer says of our certificate reaches the one who called, in words.
func TestAlertsInWords(t *testing.T) {
	a := authority(t)
	serverDir := folder(t, authority(t), "node-b", 0) // trusts only its own
	clientDir := folder(t, a, "node-a", 0)
	content, err := os.ReadFile(filepath.Join(serverDir, certs.CACertFile))
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.ReadFile(filepath.Join(clientDir, certs.CACertFile))
	if err != nil {
		t.Fatal(err)
	}
	// The client trusts both authorities.
	if err := os.WriteFile(filepath.Join(clientDir, certs.CACertFile), append(own, content...), 0o644); err != nil {
		t.Fatal(err)
	}
	r := serve(t, func(l *slog.Logger) *Identity { return NewIdentity("node-b", serverDir, l) })
	for range 10 { // each time, whatever arrives first
		_, err = ask(t, NewIdentity("node-a", clientDir, discard()).Client("node-b", r.address))
		if err == nil || !strings.Contains(err.Error(), "it refused this node's certificate: it does not trust the authority it is from") {
			t.Fatal(err)
		}
	}
}

// New certificates are taken without a restart; those that can't be read are
// not, and what was good goes on.
func TestCertificatesAreReadAnew(t *testing.T) {
	a := authority(t)
	dir := folder(t, a, "node-b", 0)
	r := serve(t, func(l *slog.Logger) *Identity { return NewIdentity("node-b", dir, l) })
	client := NewIdentity("node-a", folder(t, a, "node-a", 0), discard()).Client("node-b", r.address)
	must := func(what string) {
		t.Helper()
		if _, err := ask(t, client); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	must("at first")
	path := filepath.Join(dir, certs.NodeFile)
	if err := os.WriteFile(path, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	must("with a file that is half written")
	r.log.await(t, "new certificates can't be used")
	must("again")
	if n := strings.Count(r.log.String(), "new certificates can't be used"); n != 1 {
		t.Errorf("said %d times", n)
	}
	good, err := os.ReadFile(filepath.Join(folder(t, a, "node-b", 0), certs.NodeFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	must("with new ones")
	r.log.await(t, "certificates read anew")
	// From now on it trusts another authority, and the client's is none.
	trusting(t, dir, folder(t, authority(t), "x", 0))
	if _, err := ask(t, client); err == nil {
		t.Error("a client of an authority that is not trusted any more was accepted")
	}
}

// Who does not say who it is costs a bounded number of connections for a bounded
// time, and keeps nobody out for long.
func TestSilentConnectionsAreBounded(t *testing.T) {
	a := authority(t)
	dir := folder(t, a, "node-b", 0)
	r := serve(t, func(l *slog.Logger) *Identity { return NewIdentity("node-b", dir, l) })
	var silent []net.Conn
	for range 2 * maxPendingHost {
		conn, err := net.Dial("tcp", r.address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		silent = append(silent, conn)
	}
	r.log.await(t, fmt.Sprintf("%d connections of it have not shown a certificate yet", maxPendingHost))
	r.server.limits.mu.Lock()
	if r.server.limits.pending > maxPendingHost {
		t.Errorf("%d connections are pending", r.server.limits.pending)
	}
	r.server.limits.mu.Unlock()
	for _, conn := range silent { // each is ended by the server
		if err := conn.SetReadDeadline(time.Now().Add(60 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, conn); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Error(err)
		}
	}
	awaitNone(t, &r.server.limits)
	r.log.await(t, "did not finish the handshake in time")
	if _, err := ask(t, NewIdentity("node-a", folder(t, a, "node-a", 0), discard()).Client("node-b", r.address)); err != nil {
		t.Error(err)
	}
	awaitNone(t, &r.server.limits)
}

func TestConnectionsOfANodeAreBounded(t *testing.T) {
	l := &limits{each: 5}
	var open []*limitedConn
	for i := range 11 {
		if why := l.enter("h"); why != "" {
			t.Fatal(why)
		}
		left, right := net.Pipe()
		defer right.Close()
		c := &limitedConn{Conn: left, limits: l, host: "h", pending: true}
		many, err := l.promote(c, "node-a")
		if (err != nil) != (i == 10) || many != (i >= 5) {
			t.Errorf("connection %d: %v, %v", i, many, err)
		}
		open = append(open, c)
	}
	for _, c := range open {
		c.Close()
		c.Close() // twice is once
	}
	awaitNone(t, l)
	for i := range maxPending {
		if why := l.enter(fmt.Sprint(i)); why != "" {
			t.Fatal(why)
		}
	}
	if l.enter("one more") == "" {
		t.Error("pending connections have no limit")
	}
}

// In plaintext a node's name is what it says.
func TestPlaintext(t *testing.T) {
	r := serve(t, func(l *slog.Logger) *Identity { return NewIdentity("node-b", "", l) })
	got, err := ask(t, NewIdentity("node-a", "", discard()).Client("node-b", r.address))
	if err != nil || got != "node-a@127.0.0.1" {
		t.Errorf("%q, %v", got, err)
	}
	for name, want := range map[string]string{"node-c": "node 'node-c' is not among", "bad name": "does not say which node"} {
		if _, err := ask(t, NewIdentity(name, "", discard()).Client("node-b", r.address)); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	a := authority(t)
	if _, err := ask(t, NewIdentity("node-a", folder(t, a, "node-a", 0), discard()).Client("node-b", r.address)); err == nil {
		t.Error("a client with certificates talked to a server without")
	}
}

func TestUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(t.Context(), "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := Listen(t.Context(), "unix:"+path); err == nil || !strings.Contains(err.Error(), "another program answers") {
		t.Errorf("a second one: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if l, err = Listen(t.Context(), "unix:"+path); err != nil {
		t.Fatalf("over what a killed program left: %v", err)
	}
	l.Close()
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), "unix:"+path); err == nil {
		t.Error("a file was replaced")
	}
}

// A dead path is noticed on both sides' sockets.
func TestSocketOptions(t *testing.T) {
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := dial(t.Context(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	for what, c := range map[string]net.Conn{"dialled": conn, "accepted": accepted} {
		if user, idle, every := socketOptions(t, c); user != int(DeadPath.Milliseconds()) || idle != int(probeAfter.Seconds()) || every != int(probeEvery.Seconds()) {
			t.Errorf("%s: user timeout %d ms, first probe after %d s, then every %d s", what, user, idle, every)
		}
	}
}

func TestRefusalsAreBounded(t *testing.T) {
	var r refusals
	now := time.Now()
	if _, log := r.note("a", "x", now); !log {
		t.Error("the first is not logged")
	}
	for range 5 {
		if _, log := r.note("a", "x", now.Add(time.Minute)); log {
			t.Error("logged again")
		}
	}
	if since, log := r.note("a", "x", now.Add(2*time.Hour)); !log || since != 5 {
		t.Errorf("after two hours: %v, %d not logged since", log, since)
	}
	logged := 0
	for i := range 10000 {
		if _, log := r.note(fmt.Sprint(i), "x", now.Add(3*time.Hour+time.Duration(i)*time.Millisecond)); log {
			logged++
		}
	}
	if logged > maxLines || len(r.known) > maxRefusals {
		t.Errorf("10,000 in 10 seconds: %d lines, %d remembered", logged, len(r.known))
	}
	for i := range 1000 {
		r.note(fmt.Sprint(i), "y", now.Add(4*time.Hour+time.Duration(i)*lineWindow))
	}
	if len(r.known) > maxRefusals {
		t.Errorf("%d remembered", len(r.known))
	}
}
