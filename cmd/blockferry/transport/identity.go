package transport

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"blockferry/cmd/blockferry/certs"
)

// Identity is who this node is to others. It may be used by several goroutines.
type Identity struct {
	name string
	dir  string // "": no certificates, plaintext
	log  *slog.Logger

	mu     sync.Mutex
	node   *certs.Node // the last that could be read
	stamps [2]stamp    // of what was read last
	err    error       // why that could not be read
	read   bool
}

// stamp tells a file that changed.
type stamp struct {
	modified time.Time
	size     int64
	inode    any
	missing  bool
}

// NewIdentity is a node of a name, with the folder of its certificates; without
// one it speaks in plaintext.
func NewIdentity(name, dir string, log *slog.Logger) *Identity {
	return &Identity{name: name, dir: dir, log: log}
}

// Plaintext reports whether nothing is encrypted.
func (i *Identity) Plaintext() bool { return i.dir == "" }

// load is the certificate to show now. When new files can't be read those read
// before go on being used; an expired certificate is never shown.
func (i *Identity) load() (*certs.Node, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	// Before the files are read: what changes meanwhile is read again.
	var now [2]stamp
	for n, file := range []string{certs.NodeFile, certs.CACertFile} {
		now[n] = stampOf(filepath.Join(i.dir, file))
	}
	if !i.read || now != i.stamps {
		node, err := certs.ReadNode(i.dir)
		switch {
		case err == nil && i.read:
			i.log.Info("certificates read anew", "certificate", node.Info.String(), "expiry", node.Expiry(time.Now()))
		case err != nil && i.node != nil:
			i.log.Warn("new certificates can't be used; those from before are", "error", err)
		}
		i.read, i.stamps, i.err = true, now, err
		if err == nil {
			i.node = node
		}
	}
	if i.node == nil {
		return nil, fmt.Errorf("this node's certificate can't be read: %w", i.err)
	}
	if err := i.node.Check(i.name, time.Now()); err != nil {
		return nil, fmt.Errorf("this node's certificate can't be used: %w", errors.Join(err, i.err))
	}
	return i.node, nil
}

func stampOf(path string) stamp {
	info, err := os.Stat(path)
	if err != nil {
		return stamp{missing: true}
	}
	return stamp{modified: info.ModTime(), size: info.Size(), inode: inode(info)}
}

// protocolName is HTTP/2's, which gRPC speaks.
const protocolName = "h2"

// tlsConfig is what both sides have in common. Sessions are not resumed: each
// connection shows its certificate.
func tlsConfig(node *certs.Node) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{node.Certificate},
		RootCAs: node.Trusted, ClientCAs: node.Trusted, ClientAuth: tls.RequireAndVerifyClientCert,
		SessionTicketsDisabled: true, NextProtos: []string{protocolName},
	}
}
