package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"blockferry/cmd/blockferry/certs"
)

// alerts are what the other side says of the certificate that this one showed.
var alerts = []struct{ alert, words string }{
	{"expired certificate", "it has expired, or its clock or ours is wrong"},
	{"unknown certificate authority", "it does not trust the authority it is from"},
	{"bad certificate", "it does not accept it: see its log"},
	{"certificate required", "it wants one"},
	{"unsupported certificate", "it is of a kind it does not know"},
	{"unknown certificate", "it does not accept it: see its log"},
}

// handshakeWords says why a handshake failed; theirs says whose certificate is
// looked at here.
func handshakeWords(err error) string {
	var bad *tls.CertificateVerificationError
	if errors.As(err, &bad) {
		return certificateWords(bad)
	}
	if words := alertWords(err.Error()); words != "" {
		return words
	}
	var plain tls.RecordHeaderError
	text := err.Error()
	switch {
	case errors.As(err, &plain), strings.Contains(text, "first record does not look like a TLS handshake"):
		return "it does not speak TLS: plaintext is not accepted here"
	case strings.Contains(text, "client didn't provide a certificate"):
		return "it shows no certificate"
	case strings.Contains(text, "unsupported versions"), strings.Contains(text, "protocol version not supported"):
		return "it speaks no TLS 1.3"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return "it did not finish the handshake in time"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "it closed the connection during the handshake"
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		text = op.Err.Error() // without the addresses: the port is another each time
	}
	return clip(text)
}

// alertWords is for what comes back, also within other words; "": no alert.
func alertWords(text string) string {
	_, alert, found := strings.Cut(text, "remote error: tls: ")
	if !found {
		return ""
	}
	for _, a := range alerts {
		if strings.HasPrefix(alert, a.alert) {
			return "it refused this node's certificate: " + a.words
		}
	}
	return "it ended the handshake: " + clip(strings.TrimRight(alert, `"`))
}

func certificateWords(bad *tls.CertificateVerificationError) string {
	whose := "its certificate"
	if len(bad.UnverifiedCertificates) > 0 {
		leaf := bad.UnverifiedCertificates[0]
		if name, err := certs.NodeName(leaf); err == nil {
			whose = fmt.Sprintf("its certificate, of node '%s',", clip(name))
		}
	}
	var foreign x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var name x509.HostnameError
	switch {
	case errors.As(bad.Err, &foreign):
		return whose + " is not by an authority that is trusted here"
	case errors.As(bad.Err, &invalid) && invalid.Reason == x509.Expired && invalid.Cert != nil:
		if time.Now().Before(invalid.Cert.NotBefore) {
			return fmt.Sprintf("%s is not valid before %s; is the clock right?", whose, invalid.Cert.NotBefore.UTC().Format("2006-01-02 15:04 MST"))
		}
		return fmt.Sprintf("%s expired on %s", whose, invalid.Cert.NotAfter.UTC().Format("2006-01-02 15:04 MST"))
	case errors.As(bad.Err, &name):
		return fmt.Sprintf("%s is not of node '%s'", whose, name.Host)
	}
	return whose + " is not accepted: " + clip(bad.Err.Error())
}

// inWords is a failed call in words; its code stays.
func (c *Client) inWords(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	where := fmt.Sprintf("node '%s' at %s", c.peer, c.address)
	words, fault := "", Fault(0)
	switch s.Code() {
	case codes.Unavailable:
		if c.handshake != "" {
			words, fault = where+": "+c.handshake, c.fault
		} else if alert := alertWords(s.Message()); alert != "" {
			words, fault = where+": "+alert, alertFault(s.Message())
		} else {
			words, fault = where+" can't be reached: "+clip(lastPart(s.Message())), Unreachable
		}
	case codes.PermissionDenied:
		words, fault = where+" refuses: "+clip(s.Message()), NotAllowed
	case codes.Canceled:
		return err
	default:
		words = where + ": " + clip(s.Message())
	}
	return &callError{status.New(s.Code(), words), fault}
}

// Fault is why a call failed, as far as somebody can do something about it.
type Fault int

// The faults; 0: another, or none.
const (
	_                Fault = iota
	Unreachable            // nobody answers
	OwnCertificate         // this node's can't be shown, or is not accepted
	TheirCertificate       // the other node's is not accepted
	NotAllowed             // this node may not call there
)

// FaultOf says which fault a failed call's error is of.
func FaultOf(err error) Fault {
	var call *callError
	if errors.As(err, &call) {
		return call.fault
	}
	return 0
}

// ownError says that this node has no certificate to show.
type ownError struct{ error }

func (e *ownError) Unwrap() error { return e.error }

func handshakeFault(err error) Fault {
	var own *ownError
	var bad *tls.CertificateVerificationError
	switch {
	case errors.As(err, &own):
		return OwnCertificate
	case errors.As(err, &bad):
		return TheirCertificate
	}
	return alertFault(err.Error())
}

func alertFault(text string) Fault {
	for _, a := range alerts {
		if strings.Contains(text, "remote error: tls: "+a.alert) {
			return OwnCertificate
		}
	}
	return 0
}

// callError says why a call failed, in words alone; gRPC still finds its code.
type callError struct {
	status *status.Status
	fault  Fault
}

func (e *callError) Error() string              { return e.status.Message() }
func (e *callError) GRPCStatus() *status.Status { return e.status }

// lastPart takes the cause out of what gRPC wraps around it.
func lastPart(text string) string {
	for _, mark := range []string{`desc = "transport: `, `desc = "`} {
		if i := strings.LastIndex(text, mark); i >= 0 {
			return strings.TrimRight(text[i+len(mark):], `"`)
		}
	}
	return text
}

// clipBytes keeps what others say from filling our log.
const clipBytes = 300

func clip(s string) string {
	if len(s) > clipBytes {
		s = s[:clipBytes] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}
