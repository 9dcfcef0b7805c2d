package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// A program in a guest does what others tell it, the host or another guest: one call at a
// time on each connection, asked for and answered as a line of JSON.

// servePort is where it listens.
const servePort = "7000"

type call struct {
	Do string          `json:"do"` // "": only answer
	In json.RawMessage `json:"in,omitempty"`
}

type answer struct {
	Out    json.RawMessage `json:"out,omitempty"`
	Failed string          `json:"failed,omitempty"`
}

// Serve answers calls to this guest by do, whose results are handed back as JSON. It
// returns only an error. do is called by several goroutines if there are several callers.
func Serve(do func(name string, in json.RawMessage) (out any, err error)) error {
	listener, err := net.Listen("tcp", net.JoinHostPort(os.Getenv(addressVar), servePort))
	if err != nil {
		return err
	}
	defer listener.Close()
	var all sync.WaitGroup
	defer all.Wait()
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		all.Go(func() {
			defer connection.Close()
			serve(connection, do)
		})
	}
}

// serve ends with the connection: who called may have been powered off.
func serve(connection io.ReadWriter, do func(name string, in json.RawMessage) (out any, err error)) {
	in, out := json.NewDecoder(connection), json.NewEncoder(connection)
	for {
		var c call
		if in.Decode(&c) != nil {
			return
		}
		var a answer
		if c.Do != "" {
			result, err := do(c.Do, c.In)
			if err == nil {
				a.Out, err = json.Marshal(result)
			}
			if err != nil {
				a.Failed = err.Error()
			}
		}
		if out.Encode(a) != nil {
			return
		}
	}
}

// Line leads to a program that serves. For one goroutine.
type Line struct {
	connection net.Conn
	in         *json.Decoder
	out        *json.Encoder
}

// errRefused is a call that was answered: it failed there.
type errRefused struct{ error }

// answerPause is how long after an attempt to reach a guest the next one is made.
const answerPause = 100 * time.Millisecond

// Dial reaches another guest, from a guest, once that serves.
func Dial(ctx context.Context, address string) (*Line, error) {
	return dialWith(ctx, address, func(ctx context.Context, address string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", address)
	})
}

func dialWith(ctx context.Context, address string, dial func(context.Context, string) (net.Conn, error)) (*Line, error) {
	for {
		line, err := dialOnce(ctx, address, dial)
		if err == nil {
			return line, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("the guest at %s does not answer: %w", address, err)
		case <-time.After(answerPause):
		}
	}
}

func dialOnce(ctx context.Context, address string, dial func(context.Context, string) (net.Conn, error)) (*Line, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	connection, err := dial(ctx, net.JoinHostPort(address, servePort))
	if err != nil {
		return nil, err
	}
	return &Line{connection, json.NewDecoder(connection), json.NewEncoder(connection)}, nil
}

// Call has the guest do something and waits for it; out, if set, gets what it says. After
// an error other than that the guest failed to do it, the line can only be closed.
func (l *Line) Call(ctx context.Context, do string, in, out any) error {
	stop := context.AfterFunc(ctx, func() { _ = l.connection.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c := call{Do: do}
	var err error
	if c.In, err = json.Marshal(in); err != nil {
		return err
	}
	var a answer
	if err := errors.Join(l.out.Encode(c), l.in.Decode(&a)); err != nil {
		return errors.Join(ctx.Err(), err)
	}
	if a.Failed != "" {
		return errRefused{errors.New(a.Failed)}
	}
	if out == nil || len(a.Out) == 0 {
		return nil
	}
	return json.Unmarshal(a.Out, out)
}

// Close ends the line.
func (l *Line) Close() error { return l.connection.Close() }
