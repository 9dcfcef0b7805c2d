package certs

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"blockferry/blockdev"
)

// Names of the files in a folder.
const (
	CACertFile = "ca.crt"
	CAKeyFile  = "ca.key"
	NodeFile   = "node.pem"
)

// How long certificates are good for unless it is said, and from when before
// their making on: clocks differ.
const (
	DefaultCADays   = 3650
	DefaultNodeDays = 365
	MaxDays         = 36500

	clockSlack = time.Hour
	day        = 24 * time.Hour
)

// maxFileBytes is more than any of these files has.
const maxFileBytes = 1 << 20

// ErrExists says that a file is there that would be overwritten.
var ErrExists = errors.New("is there already")

// Authority is a CA with its key.
type Authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	pem  []byte
}

// Init makes an authority in a folder, which is made if it is missing. One that
// is there is left as it is (ErrExists).
func Init(dir, name string, now time.Time, days int) (Info, error) {
	if err := CheckDays(days); err != nil {
		return Info{}, err
	}
	for _, file := range []string{CACertFile, CAKeyFile} {
		if _, err := os.Lstat(filepath.Join(dir, file)); err == nil {
			return Info{}, fmt.Errorf("%s %w", filepath.Join(dir, file), ErrExists)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return Info{}, err
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Info{}, err
	}
	template, err := newTemplate(name, now, days)
	if err != nil {
		return Info{}, err
	}
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return Info{}, err
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return Info{}, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Info{}, err
	}
	// The certificate last: an authority without one is none.
	if err := writeNew(filepath.Join(dir, CAKeyFile), keyPEM, 0o600); err != nil {
		return Info{}, err
	}
	if err := writeNew(filepath.Join(dir, CACertFile), encodeCert(der), 0o644); err != nil {
		return Info{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return describe(filepath.Join(dir, CACertFile), cert), err
}

// OpenAuthority reads an authority with its key, and checks that they belong
// together and that it has not expired.
func OpenAuthority(dir string, now time.Time) (*Authority, error) {
	path := filepath.Join(dir, CACertFile)
	content, err := readFile(path)
	if err != nil {
		return nil, err
	}
	all, err := parseCerts(path, content)
	if err != nil {
		return nil, err
	}
	// Nodes may trust several; an authority is one.
	if len(all) != 1 || !all[0].IsCA {
		return nil, fmt.Errorf("%s is not the certificate of one authority", path)
	}
	if err := inTime(path, all[0], now); err != nil {
		return nil, err
	}
	keyPath := filepath.Join(dir, CAKeyFile)
	keyContent, err := readFile(keyPath)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(content, keyContent)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyPath, err)
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: a key that can't sign", keyPath)
	}
	return &Authority{cert: all[0], key: signer, pem: content}, nil
}

// Issue makes a node's folder: a new key, a certificate for the name, and the
// authority's certificate. A certificate that is there is left as it is
// (ErrExists).
func (a *Authority) Issue(dir, node string, now time.Time, days int) (Info, error) {
	if err := CheckNodeName(node); err != nil {
		return Info{}, err
	}
	for _, file := range []string{NodeFile, CACertFile} {
		if _, err := os.Lstat(filepath.Join(dir, file)); err == nil {
			return Info{}, fmt.Errorf("%s %w", filepath.Join(dir, file), ErrExists)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return Info{}, err
		}
	}
	cert, content, err := a.node(node, now, days)
	if err != nil {
		return Info{}, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Info{}, err
	}
	if err := writeNew(filepath.Join(dir, CACertFile), a.pem, 0o644); err != nil {
		return Info{}, err
	}
	path := filepath.Join(dir, NodeFile)
	return describe(path, cert), writeNew(path, content, 0o600)
}

// Renew gives a node's folder a new key and certificate for the name it has.
// The node may be running: it takes them at its next connection. What the node
// trusts stays, and must hold this authority.
func (a *Authority) Renew(dir string, now time.Time, days int) (was, is Info, err error) {
	old, err := ReadNode(dir)
	if err != nil {
		return was, is, err
	}
	if err := CheckNodeName(old.Name); err != nil {
		return was, is, fmt.Errorf("%s: %w", filepath.Join(dir, NodeFile), err)
	}
	trusted := false
	for _, c := range old.trusted {
		trusted = trusted || c.Equal(a.cert)
	}
	if !trusted {
		return was, is, fmt.Errorf("%s does not hold the authority %q, fingerprint %s: add its %[4]s first, to this node and to its peers",
			filepath.Join(dir, CACertFile), a.cert.Subject.CommonName, fingerprint(a.cert), CACertFile)
	}
	cert, content, err := a.node(old.Name, now, days)
	if err != nil {
		return was, is, err
	}
	path := filepath.Join(dir, NodeFile)
	return old.Info, describe(path, cert), blockdev.ReplaceFile(path, content, int64(len(content)), 0o600)
}

// node signs a new key for a node. The content is that of its file.
func (a *Authority) node(name string, now time.Time, days int) (*x509.Certificate, []byte, error) {
	if err := CheckDays(days); err != nil {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template, err := newTemplate(name, now, days)
	if err != nil {
		return nil, nil, err
	}
	template.DNSNames = []string{name}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.BasicConstraintsValid = true
	// One node is client here and server there.
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	if template.NotAfter.After(a.cert.NotAfter) {
		template.NotAfter = a.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	keyPEM, err := encodeKey(key)
	return cert, append(encodeCert(der), keyPEM...), err
}

func newTemplate(name string, now time.Time, days int) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-clockSlack), NotAfter: now.Add(time.Duration(days) * day),
	}, nil
}

// CheckDays says what is wrong with how long a certificate is to be good for.
func CheckDays(days int) error {
	if days < 1 || days > MaxDays {
		return fmt.Errorf("%d days are not between 1 and %d", days, MaxDays)
	}
	return nil
}

// CheckNodeName says what is wrong with a node's name: it is a label of a DNS
// name, in small letters.
func CheckNodeName(name string) error {
	if name == "" || len(name) > 63 {
		return fmt.Errorf("node name '%s': 1 to 63 characters are allowed", name)
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return fmt.Errorf("node name '%s': only a-z, 0-9 and '-' are allowed", name)
		}
	}
	if name[0] == '-' || name[len(name)-1] == '-' {
		return fmt.Errorf("node name '%s': it must not begin or end with '-'", name)
	}
	return nil
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func encodeKey(key crypto.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:8])
}
