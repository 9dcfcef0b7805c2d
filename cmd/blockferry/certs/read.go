package certs

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"blockferry/blockdev"
)

// Info describes one certificate, for people and programs.
type Info struct {
	Path        string    `json:"path"`
	Name        string    `json:"name"` // of the node, or of the authority
	Authority   bool      `json:"authority"`
	IssuedBy    string    `json:"issued-by"`
	Fingerprint string    `json:"fingerprint"` // the first 8 bytes of SHA-256, in hex: to compare by eye
	NotBefore   time.Time `json:"not-before"`
	NotAfter    time.Time `json:"not-after"`
}

func describe(path string, c *x509.Certificate) Info {
	i := Info{Path: path, Authority: c.IsCA, IssuedBy: c.Issuer.CommonName, Fingerprint: fingerprint(c), NotBefore: c.NotBefore.UTC(), NotAfter: c.NotAfter.UTC()}
	if c.IsCA {
		i.Name = c.Subject.CommonName
	} else if name, err := NodeName(c); err == nil {
		i.Name = name
	}
	return i
}

// Expiry says in words how long a certificate is good for.
func (i Info) Expiry(now time.Time) string {
	on := i.NotAfter.Format("2006-01-02")
	switch left := i.NotAfter.Sub(now); {
	case now.Before(i.NotBefore):
		return fmt.Sprintf("is not valid before %s; is the clock right?", i.NotBefore.Format("2006-01-02 15:04 MST"))
	case left <= 0:
		return fmt.Sprintf("expired on %s, %s ago", on, days(-left))
	default:
		return fmt.Sprintf("expires on %s, in %s", on, days(left))
	}
}

func days(d time.Duration) string {
	if d < 2*day {
		return fmt.Sprintf("%d hours", int(d/time.Hour))
	}
	return fmt.Sprintf("%d days", int(d.Round(day)/day))
}

// String is a line about the certificate.
func (i Info) String() string {
	if i.Authority {
		return fmt.Sprintf("authority '%s', fingerprint %s", i.Name, i.Fingerprint)
	}
	return fmt.Sprintf("node '%s', issued by '%s', fingerprint %s", i.Name, i.IssuedBy, i.Fingerprint)
}

// NodeName is the node that a certificate is for: its one DNS name.
func NodeName(c *x509.Certificate) (string, error) {
	switch len(c.DNSNames) {
	case 1:
		if err := CheckNodeName(c.DNSNames[0]); err != nil {
			return "", err
		}
		return c.DNSNames[0], nil
	case 0:
		return "", errors.New("it names no node: a node's certificate holds its name as a DNS name")
	}
	return "", fmt.Errorf("it names %d nodes (%.100q): a node's certificate holds one DNS name", len(c.DNSNames), c.DNSNames)
}

// Node is what a node's folder holds.
type Node struct {
	Info
	Certificate tls.Certificate
	Trusted     *x509.CertPool
	trusted     []*x509.Certificate
}

// ReadNode reads a node's folder. Whether the certificate is valid now, and
// for whom, is not checked here: see Check.
func ReadNode(dir string) (*Node, error) {
	path := filepath.Join(dir, NodeFile)
	content, err := readFile(path)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(content, content)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; it holds a certificate and its key, one after the other", path, err)
	}
	n := &Node{Certificate: pair, Trusted: x509.NewCertPool(), Info: describe(path, pair.Leaf)}
	if n.Authority {
		return nil, fmt.Errorf("%s is an authority's certificate, a node's is expected there", path)
	}
	if _, err := NodeName(pair.Leaf); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	ca := filepath.Join(dir, CACertFile)
	if content, err = readFile(ca); err != nil {
		return nil, err
	}
	if n.trusted, err = parseCerts(ca, content); err != nil {
		return nil, err
	}
	for _, c := range n.trusted {
		n.Trusted.AddCert(c)
	}
	return n, nil
}

// TrustedInfo describes the authorities that the node trusts.
func (n *Node) TrustedInfo() []Info {
	var all []Info
	for _, c := range n.trusted {
		all = append(all, describe(filepath.Join(filepath.Dir(n.Path), CACertFile), c))
	}
	return all
}

// Check says why a node of this name can't show its certificate to others that
// trust what it trusts, nil if it can.
func (n *Node) Check(name string, now time.Time) error {
	leaf := n.Certificate.Leaf
	if n.Name != name {
		return fmt.Errorf("%s is of node '%s', this node is '%s'", n.Path, n.Name, name)
	}
	if err := inTime(n.Path, leaf, now); err != nil {
		return err
	}
	between := x509.NewCertPool()
	for _, der := range n.Certificate.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			between.AddCert(c)
		}
	}
	_, err := leaf.Verify(x509.VerifyOptions{Roots: n.Trusted, Intermediates: between, CurrentTime: now, DNSName: name,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		return fmt.Errorf("%s is not by an authority in %s: %w", n.Path, filepath.Join(filepath.Dir(n.Path), CACertFile), err)
	}
	return nil
}

func inTime(path string, c *x509.Certificate, now time.Time) error {
	if now.Before(c.NotBefore) || now.After(c.NotAfter) {
		return fmt.Errorf("%s %s", path, describe(path, c).Expiry(now))
	}
	return nil
}

// Show describes what stands at a path: a folder of a node or of an authority,
// or a file of certificates.
func Show(path string) ([]Info, error) {
	stat, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	files := []string{path}
	if stat.IsDir() {
		files = nil
		for _, name := range []string{NodeFile, CACertFile} {
			if _, err := os.Stat(filepath.Join(path, name)); err == nil {
				files = append(files, filepath.Join(path, name))
			} else if !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
		}
		if len(files) == 0 {
			return nil, fmt.Errorf("%s holds neither %s nor %s", path, NodeFile, CACertFile)
		}
	}
	var all []Info
	for _, file := range files {
		content, err := readFile(file)
		if err != nil {
			return nil, err
		}
		certs, err := parseCerts(file, content)
		if err != nil {
			return nil, err
		}
		for _, c := range certs {
			all = append(all, describe(file, c))
		}
	}
	return all, nil
}

// parseCerts takes the certificates of a file; keys are passed over.
func parseCerts(path string, content []byte) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for {
		var block *pem.Block
		if block, content = pem.Decode(content); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s holds no certificate in PEM", path)
	}
	return all, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, err
	}
	if len(content) > maxFileBytes {
		return nil, fmt.Errorf("%s has more than %d bytes: it is no certificate", path, maxFileBytes)
	}
	return content, nil
}

// writeNew writes a file that is not there yet, durably.
func writeNew(path string, content []byte, mode fs.FileMode) error {
	err := blockdev.CreateFile(path, content, int64(len(content)), mode)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s %w", path, ErrExists)
	}
	return err
}
