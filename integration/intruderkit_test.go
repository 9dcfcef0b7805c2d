package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"blockferry/cmd/blockferry/certs"
	"blockferry/cmd/blockferry/status"
	"blockferry/proto"
	"blockferry/protocol"
)

func oneVolume(out string) (status.Volume, error) {
	var d status.Document
	if err := json.Unmarshal([]byte(out), &d); err != nil {
		return status.Volume{}, err
	}
	if len(d.Volumes) != 1 {
		return status.Volume{}, fmt.Errorf("%d volumes in %s", len(d.Volumes), out)
	}
	return d.Volumes[0], nil
}

func readDigest(t *testing.T, r io.Reader) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// expiredFolder is node-a's by the authority in a folder, expired for days.
func expiredFolder(t *testing.T, ca string) string { return expiredOf(t, ca, "node-a") }

// expiredOf is the same for any node.
func expiredOf(t *testing.T, ca, node string) string {
	t.Helper()
	a, err := certs.OpenAuthority(ca, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "expired")
	if _, err := a.Issue(dir, node, time.Now().AddDate(0, 0, -40), 30); err != nil {
		t.Fatal(err)
	}
	return dir
}

// junkSeed makes each of them another.
var junkSeed atomic.Uint32

func junk(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{9, byte(junkSeed.Add(1))}).Read(b)
	return b
}

func flipped(b []byte, at int) []byte {
	b = append([]byte(nil), b...)
	b[at] ^= 1
	return b
}

func mustCodec(t *testing.T, codec protocol.Codec) *protocol.Compressor {
	t.Helper()
	c, err := protocol.NewCompressor(codec)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// reheaded is the first frame of b with a header that claims another offset and
// length of the volume, in bytes; see protocol/frame.go.
func reheaded(t *testing.T, b []byte, m protocol.FrameMeta, codec protocol.Codec, offset uint64, length uint32) []byte {
	t.Helper()
	f, err := protocol.NewFrameReader(b).Next()
	if err != nil {
		t.Fatal(err)
	}
	if f.Codec != codec {
		t.Fatalf("packed by %v, want %v", f.Codec, codec)
	}
	head := append([]byte(nil), b[:protocol.FrameHeaderBytes]...)
	binary.LittleEndian.PutUint64(head[24:], offset)
	binary.LittleEndian.PutUint32(head[32:], length)
	binary.LittleEndian.PutUint32(head[44:], crc32.Checksum(head[:44], crc32.MakeTable(crc32.Castagnoli)))
	return append(head, f.Payload...)
}

// node is a connection as node-a, over which anything can be said.
func (f *fort) node(t *testing.T) *grpc.ClientConn {
	t.Helper()
	n, err := certs.ReadNode(f.folders["node-a"])
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(f.address, grpc.WithTransportCredentials(credentials.NewTLS(clientTLS(n))))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// command asks for a volume to be taken down.
func (f *fort) command(t *testing.T) error {
	t.Helper()
	conn := f.node(t)
	defer conn.Close()
	_, err := proto.NewControlClient(conn).Down(t.Context(), &proto.VolumeRequest{Volume: "data", Force: true})
	return err
}

// rawMessage says bytes in the place of a message, with its head of five: packed
// or not, and its length.
func (f *fort) rawMessage(t *testing.T, b []byte) error {
	t.Helper()
	n, err := certs.ReadNode(f.folders["node-a"])
	if err != nil {
		t.Fatal(err)
	}
	return rawCall(t.Context(), f.address, clientTLS(n), b)
}

// clientTLS shows a node's certificate, good or not, to anybody.
func clientTLS(n *certs.Node) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{n.Certificate}, InsecureSkipVerify: true, NextProtos: []string{"h2"}}
}

// rawCall makes a call whose body is given, and returns how it was answered.
func rawCall(ctx context.Context, address string, c *tls.Config, body []byte) error {
	transport := &http.Transport{TLSClientConfig: c, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+address+proto.Replication_Replicate_FullMethodName, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("TE", "trailers")
	reply, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer reply.Body.Close()
	if _, err := io.Copy(io.Discard, reply.Body); err != nil {
		return err
	}
	for _, h := range []http.Header{reply.Header, reply.Trailer} {
		if code := h.Get("Grpc-Status"); code != "" && code != "0" {
			return fmt.Errorf("status %s: %s", code, h.Get("Grpc-Message"))
		}
	}
	return nil
}

// floodOnce opens a connection, says something that is no handshake, and waits
// for the end or some time.
func floodOnce(ctx context.Context, address string) (int64, error) {
	d := net.Dialer{Timeout: time.Second}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	_ = conn.SetDeadline(time.Now().Add(200 * time.Millisecond))
	if _, err := conn.Write(make([]byte, 4096)); err != nil {
		return 0, err
	}
	return io.Copy(io.Discard, conn)
}
