// Package lease keeps in etcd which node may write a volume. It takes, renews and
// gives up leases, and decides nothing: who may take one, and what its end means, is
// the agent's.
package lease

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// Two keys for each volume, by its UUID, with JSON for values:
//
//	PREFIX/UUID/holder   Claim; there only while its etcd lease lives
//	PREFIX/UUID/record   Record; stays when the lease has ended
//
// The holder's key is made by a transaction that wants it absent, with the lease
// attached, and never changed: who finds that lease on it is who made it. The record
// is written only by transactions that find the writer's lease on the holder's key.
const (
	holderKey = "/holder"
	recordKey = "/record"
	// version is that of both values. Others are refused.
	version = 1
	// maxValue bounds what is read, in bytes.
	maxValue = 64 << 10

	// connectAgain bounds the wait between two tries to connect.
	connectAgain = time.Second
	watchAgain   = time.Second
	aliveEvery   = 10 * time.Second // the least that etcd's servers bear
	aliveWait    = 2 * time.Second
)

// ErrHeld says that a node has the lease.
var ErrHeld = errors.New("the lease is held")

// ErrLost says that the lease has ended, or is another's: not that etcd did not answer.
var ErrLost = errors.New("the lease is lost")

// Claim names who has a volume's lease.
type Claim struct {
	Version int    `json:"v"`
	Node    string `json:"node"`
	// Boot is the kernel's id of that node's start: another process of the same start may take
	// the lease over.
	Boot string `json:"boot"`
	// Generation and Epoch are the position at which the node took it, in hex and
	// counted; for people.
	Generation string `json:"generation,omitempty"`
	Epoch      uint64 `json:"epoch,omitempty"`
	// Lease is etcd's id of it.
	Lease int64 `json:"lease"`
}

// Record says who wrote a volume last, and which copies could go on in its place.
type Record struct {
	Version int    `json:"v"`
	Node    string `json:"node"`
	// Disk is the last cut that the node's own disk held when this was written; nil: none, or
	// it was written by a version that does not say.
	Disk *Copy `json:"disk,omitempty"`
	// Copies are, by node, what each has at least. A node that is not named lacks more
	// than the volume may lose, or is not known. Of Node itself it is a copy beside its
	// disk, which that can be filled from.
	Copies map[string]Copy `json:"copies,omitempty"`
}

// Copy is a position that a copy holds: the generation in hex, the epoch.
type Copy struct {
	Generation string `json:"generation"`
	Epoch      uint64 `json:"epoch"`
}

// Standing is what etcd says of a volume at one moment; nil is what is not there.
type Standing struct {
	Holder *Claim
	Record *Record
}

// Options say where etcd is.
type Options struct {
	Endpoints []string // http://HOST:PORT or https://HOST:PORT
	// CA is a file of authorities for https, "": the system's. Cert and Key show who
	// this node is; "": nobody. They are read anew for each connection.
	CA, Cert, Key string
	Prefix        string // without a slash at its end
	// TTL is how long a lease that is taken lives after etcd has heard of it, in whole
	// seconds.
	TTL time.Duration
	// Now is the clock that Sent is of; it must go on while the machine sleeps.
	Now func() time.Duration
}

// Client talks to etcd. It may be used by several goroutines.
type Client struct {
	options Options
	etcd    *clientv3.Client
}

// Open makes a client. It does not connect yet.
func Open(o Options) (*Client, error) {
	c := clientv3.Config{
		Endpoints: o.Endpoints, Logger: zap.NewNop(), DialKeepAliveTime: aliveEvery, DialKeepAliveTimeout: aliveWait,
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: connectAgain / 5, Multiplier: 1.6, Jitter: 0.2, MaxDelay: connectAgain},
			MinConnectTimeout: aliveWait,
		})},
	}
	if len(o.Endpoints) > 0 && strings.HasPrefix(o.Endpoints[0], "https:") {
		var err error
		if c.TLS, err = o.tls(); err != nil {
			return nil, err
		}
	}
	etcd, err := clientv3.New(c)
	if err != nil {
		return nil, fmt.Errorf("etcd at %s: %w", strings.Join(o.Endpoints, ", "), err)
	}
	return &Client{o, etcd}, nil
}

func (o Options) tls() (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CA != "" {
		pem, err := os.ReadFile(o.CA)
		if err != nil {
			return nil, err
		}
		if c.RootCAs = x509.NewCertPool(); !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate of an authority", o.CA)
		}
	}
	if o.Cert != "" {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(o.Cert, o.Key)
			return &pair, err
		}
	}
	return c, nil
}

// Close ends all requests. Leases live on until their time is over.
func (c *Client) Close() error { return c.etcd.Close() }

func (c *Client) key(volume, name string) string { return c.options.Prefix + "/" + volume + name }

// fail says of an error where it comes from.
func (c *Client) fail(err error) error {
	return fmt.Errorf("etcd at %s: %w", strings.Join(c.options.Endpoints, ", "), err)
}

// Look asks a quorum for a volume's standing.
func (c *Client) Look(ctx context.Context, volume string) (s Standing, err error) {
	r, err := c.etcd.Txn(ctx).Then(clientv3.OpGet(c.key(volume, holderKey)), clientv3.OpGet(c.key(volume, recordKey))).Commit()
	if err != nil {
		return s, c.fail(err)
	}
	s.Holder, err = decode(r.Responses[0].GetResponseRange().GetKvs(), func(v *Claim) int { return v.Version })
	if err == nil {
		s.Record, err = decode(r.Responses[1].GetResponseRange().GetKvs(), func(v *Record) int { return v.Version })
	}
	return s, err
}

// decode reads a key's value; nil: it is not there.
func decode[T any](kvs []*mvccpb.KeyValue, of func(*T) int) (*T, error) {
	if len(kvs) == 0 {
		return nil, nil
	}
	v, raw := new(T), kvs[0].Value
	if len(raw) > maxValue {
		return nil, fmt.Errorf("etcd's key %s has %d bytes, at most %d are expected", kvs[0].Key, len(raw), maxValue)
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return nil, fmt.Errorf("etcd's key %s does not hold what belongs there: %w", kvs[0].Key, err)
	}
	if of(v) != version {
		return nil, fmt.Errorf("etcd's key %s is of version %d, known here is %d", kvs[0].Key, of(v), version)
	}
	return v, nil
}

// Lease is one that this process has taken, or taken over. Its methods may be called
// by one goroutine at a time.
type Lease struct {
	client *Client
	volume string
	id     clientv3.LeaseID
	ttl    time.Duration // 0: not known
	sent   time.Duration
}

// Sent is when the last request that etcd took as a sign of life was begun, by
// Options.Now: the lease lives at least TTL after that.
func (l *Lease) Sent() time.Duration { return l.sent }

// TTL is how long the lease lives after a sign of life: Options.TTL, or less if it was
// taken with less and resumed. It does not change.
func (l *Lease) TTL() time.Duration { return l.ttl }

// Take takes a volume's lease that nobody has. The error is ErrHeld when somebody
// does. After any other error it is not known whether it was taken; if it was it ends by itself,
// and meanwhile the claim names this node (Resume).
func (c *Client) Take(ctx context.Context, volume string, claim Claim) (*Lease, error) {
	sent := c.options.Now()
	granted, err := c.etcd.Grant(ctx, int64(c.options.TTL/time.Second))
	if err != nil {
		return nil, c.fail(err)
	}
	l := &Lease{c, volume, granted.ID, c.counted(granted.TTL), sent}
	claim.Version, claim.Lease = version, int64(granted.ID)
	value, err := json.Marshal(claim)
	if err != nil {
		return nil, err
	}
	key := c.key(volume, holderKey)
	r, err := c.etcd.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, string(value), clientv3.WithLease(granted.ID))).Else(clientv3.OpGet(key)).Commit()
	if err == nil && r.Succeeded {
		return l, nil
	}
	revoke := l.Release(ctx)
	if err != nil {
		return nil, c.fail(err)
	}
	holder, err := decode(r.Responses[0].GetResponseRange().GetKvs(), func(v *Claim) int { return v.Version })
	if err != nil || holder == nil {
		return nil, errors.Join(ErrHeld, err, revoke)
	}
	return nil, fmt.Errorf("%w by node '%s'", ErrHeld, holder.Node)
}

// counted is how long a lease is taken to live that etcd granted for so many seconds.
func (c *Client) counted(seconds int64) time.Duration {
	return min(time.Duration(seconds)*time.Second, c.options.TTL)
}

// Resume takes over the lease of an earlier process of this start of this node, which
// its claim names, and renews it. It lives for as long as it was granted (TTL). The error is ErrLost when it has ended.
func (c *Client) Resume(ctx context.Context, volume string, claim Claim) (*Lease, error) {
	l := &Lease{client: c, volume: volume, id: clientv3.LeaseID(claim.Lease)}
	return l, l.Renew(ctx, nil)
}

// Renew proves that the lease is held still, writes the record unless it is nil, and
// has the lease live for another TTL, in this order; Sent moves. The error is ErrLost
// when it is not held any more. After any other error the lease may or may not have been
// renewed, and Sent is what it was.
func (l *Lease) Renew(ctx context.Context, record *Record) error {
	key := l.client.key(l.volume, holderKey)
	var then []clientv3.Op
	if record != nil {
		r := *record
		r.Version = version
		value, err := json.Marshal(r)
		if err != nil {
			return err
		}
		then = append(then, clientv3.OpPut(l.client.key(l.volume, recordKey), string(value)))
	}
	r, err := l.client.etcd.Txn(ctx).If(clientv3.Compare(clientv3.LeaseValue(key), "=", int64(l.id))).Then(then...).Commit()
	if err != nil {
		return l.client.fail(err)
	}
	if !r.Succeeded {
		return fmt.Errorf("%w: etcd's key %s is gone, or another's", ErrLost, key)
	}
	sent := l.client.options.Now()
	alive, err := l.client.etcd.KeepAliveOnce(ctx, l.id)
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		return fmt.Errorf("%w: etcd does not know it any more", ErrLost)
	case err != nil:
		return l.client.fail(err)
	}
	ttl := l.client.counted(alive.TTL)
	if l.ttl != 0 && ttl < l.ttl {
		return fmt.Errorf("%w: etcd has it live for %v, it was granted for %v", ErrLost, ttl, l.ttl)
	}
	if l.ttl == 0 {
		l.ttl = ttl
	}
	l.sent = sent
	return nil
}

// Release ends the lease at once: whoever waits for it may take it. Nobody may write
// to the volume any more.
func (l *Lease) Release(ctx context.Context) error {
	_, err := l.client.etcd.Revoke(ctx, l.id)
	if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return l.client.fail(err)
	}
	return nil
}

// Watch tells when a volume's holder may have changed, until ctx ends. What happens
// while etcd does not answer may be missed, so it is to be asked now and then, too.
func (c *Client) Watch(ctx context.Context, volume string) <-chan struct{} {
	changed := make(chan struct{}, 1)
	go func() {
		for ctx.Err() == nil {
			round, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
			for range c.etcd.Watch(round, c.key(volume, holderKey), clientv3.WithCreatedNotify()) {
				select {
				case changed <- struct{}{}:
				default:
				}
			}
			cancel()
			select {
			case <-ctx.Done():
			case <-time.After(watchAgain):
			}
		}
	}()
	return changed
}
