package main

import (
	"encoding/json"
	"time"
)

func now() time.Time { return time.Now() }

// sayJSON prints one line of JSON.
func (g *globalOptions) sayJSON(document any) error {
	line, err := json.Marshal(document)
	if err != nil {
		return err
	}
	_, err = g.out.Write(append(line, '\n'))
	return err
}
